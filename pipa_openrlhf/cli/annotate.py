"""Label the steps of sampled answers: by rule, by going on from them, by a language model, or where two agree.

python -m pipa_openrlhf.cli.annotate --annotate.method rule --annotate.input sampled.jsonl --annotate.output s.jsonl

Rows are written as they are labelled, and the same command given again goes on where it was.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pipa_openrlhf.annotate.config import AnnotateConfig
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError

if TYPE_CHECKING:
    from pipa_openrlhf.annotate.answers import SampledAnswer, Verdict
    from pipa_openrlhf.generate.problems import RowFile

_ROWS_AT_ONCE = 1_000
# What an output does not depend on: how fast replies come, and how many may be paid for.
_FREE = ("cache_dir", "concurrency", "requests_per_minute", "token_budget", "retries", "timeout")


def main(config: AnnotateConfig) -> None:
    """Label the answers that the output lacks."""
    config.check()
    if config.annotate.method == "consensus":
        _agree(config)
    else:
        _annotate(config)


def _agree(config: AnnotateConfig) -> None:
    from pipa_openrlhf.annotate.consensus import agreed, read_annotated
    from pipa_openrlhf.generate.problems import RowFile

    if not _is_first_rank():
        return
    flags = config.annotate
    first = read_annotated(str(flags.input), "--annotate.input")
    second = read_annotated(str(flags.other), "--annotate.other")
    rows, counts = agreed(first, second)
    print(", ".join(f"{count} {what}" for what, count in counts.most_common()), flush=True)
    if not rows:
        raise UserError(f"{flags.input} and {flags.other} agree on no answer: are they annotations of the same ones?")
    content = [[[*one.key, one.first_error] for one in annotated] for annotated in (first, second)]
    file = RowFile(str(flags.output), {"method": flags.method, "answers_sha256": _sha256(content)})
    file.append(rows[len(file.rows) :])
    print(f"{len(rows)} of {len(first)} answers kept: {flags.output}", flush=True)


def _annotate(config: AnnotateConfig) -> None:
    from pipa_openrlhf.annotate.answers import read_answers
    from pipa_openrlhf.generate.problems import RowFile

    flags = config.annotate
    answers = _graded(read_answers(str(flags.input), "--annotate.input"))
    places = {answer.key: number for number, answer in enumerate(answers)}
    file = RowFile(str(flags.output), _description(config, answers)) if _is_first_rank() else None
    done = {(row["problem_id"], row["sample"]) for row in file.rows} if file else set()
    left = [answer for answer in answers if answer.key not in done]
    problem = None
    if flags.method == "rollout":
        _by_rollouts(config, answers, file, done)
    elif file is not None and flags.method == "rule":
        _by_rule(config, left, file)
    elif file is not None:
        problem = _by_model(config, left, file)
    if file is None:
        return
    if problem is None:
        file.reorder(lambda row: places[row["problem_id"], row["sample"]])
    print(f"{_summary(file.rows, answers)}: {flags.output}", flush=True)
    if problem is not None:
        raise UserError(problem)


def _by_rule(config: AnnotateConfig, left: "list[SampledAnswer]", file: "RowFile") -> None:
    from pipa_openrlhf.annotate.rule import judge_by_rule

    for start in range(0, len(left), _ROWS_AT_ONCE):
        part = left[start : start + _ROWS_AT_ONCE]
        file.append(_rows(config, zip(part, map(judge_by_rule, part))))


def _by_rollouts(
    config: AnnotateConfig, answers: "list[SampledAnswer]", file: "RowFile | None", done: set[tuple[str, int]]
) -> None:
    from pipa_openrlhf.annotate.rollout import judge_by_rollouts

    verdicts = judge_by_rollouts(config, answers)
    if file is not None and verdicts is not None:
        judged = ((answer, verdict) for answer, verdict in zip(answers, verdicts) if answer.key not in done)
        file.append(_rows(config, judged))


def _by_model(config: AnnotateConfig, left: "list[SampledAnswer]", file: "RowFile") -> str | None:
    """What is missing and why; None where nothing is."""
    from pipa_openrlhf.annotate.judge import judge_by_model

    if not left:
        return None
    result = judge_by_model(left, config.judge, lambda *judged: file.append(_rows(config, [judged])))
    missing = len(left) - result.judged
    if not missing:
        return None
    reasons = []
    if result.failures:
        where, reason = result.failures[0]
        reasons.append(f"{len(result.failures)} were asked about in vain, the first at {where}: {reason}")
    if result.stopped is not None:
        reasons.append(f"stopped: {result.stopped}")
    return f"{missing} answers have no verdict: {'; '.join(reasons)}. The same command goes on from here"


def _rows(config: AnnotateConfig, judged: "Iterable[tuple[SampledAnswer, Verdict]]") -> list[dict]:
    from pipa_openrlhf.annotate.answers import to_row

    flags = config.annotate
    return [to_row(answer, one, str(flags.method), flags.format, flags.threshold) for answer, one in judged]


def _graded(answers: "list[SampledAnswer]") -> "list[SampledAnswer]":
    """With the label of each answer that has none but a right answer to be compared with."""
    from pipa_openrlhf.evaluate.grading import Grader, extract_answer

    unknown = [number for number, one in enumerate(answers) if one.is_right is None and one.gold is not None]
    if not unknown:
        return answers
    pairs = [(extract_answer("\n".join(answers[number].steps)), str(answers[number].gold)) for number in unknown]
    with Grader() as grader:
        labels = dict(zip(unknown, grader.same(pairs)))
    return [replace(one, is_right=labels.get(number, one.is_right)) for number, one in enumerate(answers)]


def _description(config: AnnotateConfig, answers: "list[SampledAnswer]") -> dict:
    """What the rows depend on, as JSON."""
    from pipa_openrlhf.annotate.judge import read_template

    flags = config.annotate
    content = [[*one.key, one.question, one.steps, one.is_right, one.gold] for one in answers]
    description: dict = {
        "method": flags.method,
        "format": flags.format,
        "threshold": flags.threshold,
        "answers": len(answers),
        "answers_sha256": _sha256(content),
    }
    if flags.method == "judge":
        description |= asdict(config.judge) | {"prompt": read_template(config.judge.prompt)}
    if flags.method == "rollout":
        description |= asdict(config.rollout) | {"model": config.model.path, "seed": config.train.seed}
    return {name: value for name, value in description.items() if name not in _FREE}


def _sha256(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _summary(rows: list[dict], answers: "list[SampledAnswer]") -> str:
    known = {answer.key: answer for answer in answers}
    counts: Counter[str] = Counter()
    for row in rows:
        is_right = known[row["problem_id"], row["sample"]].is_right
        found = row["first_error"] >= 0
        counts["with a wrong step"] += found
        counts["of them right by their result"] += found and is_right is True
        counts["wrong by their result without one"] += not found and is_right is False
    return f"{len(rows)} of {len(answers)} answers, " + ", ".join(f"{count} {what}" for what, count in counts.items())


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def cli() -> int:
    """Console entry point."""
    return run(main, "annotate")


if __name__ == "__main__":
    sys.exit(cli())
