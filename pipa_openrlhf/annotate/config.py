"""Settings of ``cli/annotate.py``."""

import json
import os
from dataclasses import dataclass, field
from functools import partial

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.config import WriterConfig, required
from pipa_openrlhf.remembered import user_cache_dir
from pipa_openrlhf.settings import check_bounds, setting

METHODS = ("rule", "rollout", "judge", "consensus")


@dataclass(frozen=True)
class AnnotateSettings:
    """What is labelled, how, and where it goes."""

    method: str | None = setting(
        None,
        "rule: arithmetic checked; rollout: Q values by going on from each step; judge: a language model at an "
        "endpoint; consensus: what two annotated files agree on",
        choices=METHODS,
    )
    input: str | None = setting(None, "answers: a file of `sample`, or rows of question and answer", is_path=True)
    other: str | None = setting(None, "of consensus: the same answers, annotated otherwise", is_path=True)
    output: str | None = setting(None, "JSONL of answers with step labels; continued if it exists", is_written=True)
    format: str = setting("stepwise", "layout of the rows that are written", choices=("stepwise", "alphamath"))
    threshold: float = setting(
        0.5, "of a wrong answer, steps with Q below it are wrong (paper, Figure 5)", least=-1, most=1
    )


@dataclass(frozen=True)
class RolloutSettings:
    """Monte-Carlo estimates of Q: answers that begin with the first steps of the annotated ones."""

    num_samples: int = setting(8, "continuations of each beginning", least=1)
    temperature: float = setting(0.7, "sampling temperature; 0: greedy", least=0)
    top_p: float = setting(1.0, "nucleus sampling; 1: off", above=0, most=1)
    max_new_tokens: int = setting(512, "longest continuation; a longer one is wrong", least=1)
    batch_size: int = setting(96, "continuations generated at a time", least=1)
    skip_right: bool = setting(False, "do not go on from right answers, all steps of which get Q 1")


@dataclass(frozen=True)
class JudgeSettings:
    """A language model behind an OpenAI-compatible endpoint."""

    base_url: str = setting("https://api.openai.com/v1", "the endpoint, with its /v1")
    model: str | None = setting(None, "name of the model there")
    api_key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the key; unset there: none is sent")
    prompt: str | None = setting(
        None, "file of the prompt, with {question}, {steps} and optionally {reference}; unset: ours", is_path=True
    )
    temperature: float = setting(0.0, "sampling temperature", least=0)
    max_tokens: int = setting(2048, "longest reply", least=1)
    body: str | None = setting(
        None, "JSON object of further fields of a request; null takes a field out, such as temperature"
    )
    cache_dir: str = setting(partial(user_cache_dir, "judge"), "replies by their requests", is_written=True)
    concurrency: int = setting(8, "requests at a time", least=1)
    requests_per_minute: int | None = setting(None, "most requests begun in a minute; unset: any number", least=1)
    token_budget: int | None = setting(
        None, "most tokens of prompts and replies that this command pays for; unset: any number", least=1
    )
    retries: int = setting(6, "of a request that fails or is refused for its rate, each after a longer pause", least=0)
    attempts: int = setting(2, "requests for an answer whose reply names no step", least=1)
    timeout: float = setting(300.0, "seconds that a request may take", above=0)

    @property
    def more(self) -> dict:
        """``body`` as it was parsed.

        Raises:
            UserError: it is no JSON object.
        """
        try:
            more = json.loads(self.body or "{}")
        except ValueError as error:
            raise UserError(f'--judge.body is not JSON ({error}); give an object such as {{"top_p": 1}}') from error
        if not isinstance(more, dict):
            raise UserError('--judge.body is no JSON object; give one such as {"top_p": 1}')
        return more


@dataclass(frozen=True)
class AnnotateConfig(WriterConfig):
    """Of ``cli/annotate.py``. The model and its prompt are those of ``rollout``."""

    annotate: AnnotateSettings = field(default_factory=AnnotateSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)

    def check(self) -> None:
        """Raises UserError."""
        flags = self.annotate
        method = required(flags.method, "--annotate.method")
        source, output = required(flags.input, "--annotate.input"), required(flags.output, "--annotate.output")
        check_bounds(self)
        sources = [source]
        if method == "consensus":
            sources.append(required(flags.other, "--annotate.other"))
        elif flags.other is not None:
            raise UserError("--annotate.other is for --annotate.method consensus: leave it out")
        for path in sources:
            if os.path.realpath(path) == os.path.realpath(output):
                raise UserError(f"--annotate.output {output} is read too: give another file")
        if method == "judge":
            required(self.judge.model, "--judge.model")
            self.judge.more  # noqa: B018  # raises where it cannot be read
            if self.judge.prompt is not None and not os.path.isfile(self.judge.prompt):
                raise UserError(f"--judge.prompt {self.judge.prompt}: no such file")
        if method == "rollout":
            super().check()
