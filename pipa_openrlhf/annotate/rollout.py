"""Q values by Monte Carlo: a model goes on from the first steps of an answer, and what ends right is counted.

Q of a step is twice the share of it, less one. The last step of an answer needs no continuation: its Q is 1 or -1.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.annotate.answers import NO_ERROR, SampledAnswer, Verdict
from pipa_openrlhf.annotate.config import AnnotateConfig
from pipa_openrlhf.data.record import Unusable
from pipa_openrlhf.data.special_text import special_text
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.grading import Grader, extract_answer
from pipa_openrlhf.generate.job import Job, MakeRows, load_writer, run_job
from pipa_openrlhf.generate.problems import Problem
from pipa_openrlhf.generate.prompts import write_prompts
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings
from pipa_openrlhf.generate.share import Share
from pipa_openrlhf.model.loading import use_modelscope

log = logging.getLogger(__name__)

ROLLOUTS = ".rollouts.jsonl"


def judge_by_rollouts(config: AnnotateConfig, answers: list[SampledAnswer]) -> list[Verdict] | None:
    """Verdicts with Q values in the order of ``answers``; None on ranks but the first. Collective.

    The continuations' grades are kept in ``<output>.rollouts.jsonl``; those that are there are not drawn again.

    Raises:
        UserError: an answer has no right answer to grade by, or cannot be written for the model.
    """
    for answer in answers:
        if answer.gold is None or answer.is_right is None:
            raise UserError(f"{answer.where}: rollout grades by the right answer: add it as `answer` or `gold`")
    path = f"{config.annotate.output}{ROLLOUTS}"
    grades: dict[str, Counter[bool]] | None = {}
    if any(_beginnings(answer, config) for answer in answers):
        job, beginnings = _prepare(config, answers)
        log.info(f"{len(job.problems)} beginnings of {len(answers)} answers, {job.sampling.num_samples} times each")
        share = Share(job, path, job.description() | {"beginnings": "of answers"})
        with Grader() as grader:
            run_job(share.job, share.file, _row_maker(grader, beginnings), "continuing")
        rows = share.merge()
        grades = None if rows is None else _count(rows)
    return None if grades is None else [_verdict(answer, config, grades) for answer in answers]


def _beginnings(answer: SampledAnswer, config: AnnotateConfig) -> list[str]:
    """The text up to the end of each step but the last."""
    if answer.is_right and config.rollout.skip_right:
        return []
    return ["\n".join(answer.steps[:count]) + "\n" for count in range(1, len(answer.steps))]


def _prepare(config: AnnotateConfig, answers: list[SampledAnswer]) -> tuple[Job, dict[str, str]]:
    """The job of going on, each beginning once however many answers have it; beginnings by their ids."""
    if config.use_ms:
        use_modelscope()
    flags = config.rollout
    tokenizer = load_writer(config)
    questions = [Problem(str(number), one.question, str(one.gold), None) for number, one in enumerate(answers)]
    written, stop = write_prompts(questions, tokenizer, config)
    problems, prompts, beginnings = [], [], {}
    for answer, prompt in zip(answers, written):
        for beginning in _beginnings(answer, config):
            name = _name(answer, beginning)
            if name not in beginnings:
                beginnings[name] = beginning
                problems.append(Problem(name, answer.question + beginning, str(answer.gold), None))
                prompts.append(prompt + _as_text(beginning, tokenizer, answer.where))
    sampling = SamplingSettings(
        num_samples=flags.num_samples,
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_new_tokens=flags.max_new_tokens,
        batch_size=flags.batch_size,
        seed=config.train.seed,
        stop=stop,
    )
    return Job(config, str(config.annotate.input), problems, prompts, tokenizer, sampling), beginnings


def _name(answer: SampledAnswer, beginning: str) -> str:
    return hashlib.sha256(json.dumps([answer.question, answer.gold, beginning]).encode()).hexdigest()[:20]


def _as_text(beginning: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    try:
        return special_text(tokenizer).shield(beginning)
    except Unusable as reason:
        raise UserError(f"{where}: {reason}; change the answer, or leave it out") from reason


def _row_maker(grader: Grader, beginnings: dict[str, str]) -> MakeRows:
    """The grader reads a beginning with its continuation: the answer may stand in either."""

    def given(problem: Problem, answer: Answer) -> str | None:
        return extract_answer(beginnings[problem.problem_id] + answer.text) if answer.finished else None

    def make_rows(answered: list) -> list[list[dict]]:
        flat = [(given(problem, answer), problem.answer) for problem, answers in answered for answer in answers]
        labels = iter(grader.same(flat))
        return [
            [{"label": next(labels), "predicted": given(problem, one), "tokens": one.num_tokens} for one in answers]
            for problem, answers in answered
        ]

    return make_rows


def _count(rows: Iterable[dict]) -> dict[str, Counter[bool]]:
    grades: dict[str, Counter[bool]] = {}
    for row in rows:
        grades.setdefault(row["problem_id"], Counter())[row["label"]] += 1
    return grades


def _verdict(answer: SampledAnswer, config: AnnotateConfig, grades: dict[str, Counter[bool]]) -> Verdict:
    of_steps = [grades[_name(answer, beginning)] for beginning in _beginnings(answer, config)]
    q_values = [2 * one[True] / one.total() - 1 for one in of_steps] or [1.0] * (len(answer.steps) - 1)
    q_values.append(1.0 if answer.is_right else -1.0)
    if answer.is_right:
        return Verdict(NO_ERROR, q_values)
    return Verdict(
        next(n for n, q in enumerate(q_values) if q < config.annotate.threshold or n == len(q_values) - 1), q_values
    )
