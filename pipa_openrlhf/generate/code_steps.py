"""Steps with code, as in AlphaMath's layout: the code is run, and the answer goes on after what it printed."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.record import Unusable
from pipa_openrlhf.data.special_text import special_text
from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.generate.sandbox import Execution, Sandbox
from pipa_openrlhf.generate.steps import Step, StepSampler

CODE_END = "</code>"
_FENCE = re.compile(r"\s*```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```\s*)?", re.DOTALL | re.IGNORECASE)


def code_of(step: str) -> str | None:
    """The Python of a step that ends with its code; None where it ends otherwise, or has none."""
    step = step.rstrip()
    code = step.removesuffix(CODE_END).partition("<code>")[2]
    if not step.endswith(CODE_END) or CODE_END in code:
        return None
    fenced = _FENCE.fullmatch(code)
    return (fenced[1] if fenced else code).strip() or None


class CodeRunner:
    """Runs the code of steps, several at a time, and goes on after their output."""

    def __init__(self, sandbox: Sandbox, sampler: StepSampler, tokenizer: PreTrainedTokenizerBase):
        self._sandbox = sandbox
        self._sampler = sampler
        self._tokenizer = tokenizer

    def run(self, steps: Sequence[Step]) -> list[Step]:
        """The steps; to those that end with code ``<output>`` and the end of the step are added.

        Raises:
            SandboxError: the sandbox does not work any more.
        """
        texts = [self._text(step) for step in steps]
        found = [code_of(text) for text in texts]
        jobs = [
            (step.state.blocks, code) if code is not None and step.state is not None else None
            for step, code in zip(steps, found)
        ]
        distinct = list(dict.fromkeys(job for job in jobs if job is not None))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = dict(zip(distinct, pool.map(lambda job: self._sandbox.run(job[1], job[0]), distinct)))
        return [
            step if job is None else self._go_on(step, text, job[1], results[job])
            for step, text, job in zip(steps, texts, jobs)
        ]

    def _text(self, step: Step) -> str:
        if step.state is None:
            return ""  # nothing follows it
        before = step.state.ids[: len(step.state.ids) - len(step.ids)]
        return self._sampler.text(step.state.prompt + before, step.ids)

    def _go_on(self, step: Step, text: str, code: str, result: Execution) -> Step:
        assert step.state is not None
        ids = self._ids(result.output, "" if text.endswith("\n") else "\n")
        state = self._sampler.extend(step.state, ids)
        if result.ended:
            state = replace(state, blocks=(*state.blocks, code))
        return replace(step, ids=step.ids + ids, value=state.value, state=state)

    def _ids(self, output: str, line_end: str) -> list[int]:
        """Token ids of what stands after the code. No output is a special token."""
        shield = special_text(self._tokenizer).shield
        for one in (output, "this output cannot be shown"):
            try:
                text = f"{line_end}<output>\n{shield(one)}\n</output>\n</step>"
            except Unusable:
                continue
            if ids := encode([text], self._tokenizer)[0]:
                return ids
        raise AssertionError("plain words have tokens")
