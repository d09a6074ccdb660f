"""Labelled answers with something about them changed: their number, labels or weights, or how many are right.

python -m recipes.arithmetic_study.change_answers --answers answers.jsonl --output fewer.jsonl --share 0.25
"""

import os
import random
import sys
from collections import defaultdict
from dataclasses import dataclass

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import check_bounds, setting
from recipes.word_problems.problems import write_rows


@dataclass(frozen=True)
class ChangeConfig:
    """Of this script."""

    answers: str | None = setting(None, "JSONL that `recipes.word_problems.label_steps` wrote")
    output: str | None = setting(None, "JSONL to write")
    share: float = setting(1.0, "share of the problems that is kept", above=0, most=1)
    answers_per_problem: int | None = setting(None, "first answers of a problem that are kept; unset: all", least=1)
    wrong_labels: float = setting(0.0, "share of answers with all labels turned round", least=0, most=1)
    right_per_wrong: float | None = setting(
        None, "right answers for each wrong one; the larger class is thinned out; unset: as they are", above=0
    )
    equal_classes: bool = setting(False, "weights with which right answers count as much as wrong ones in total")
    threshold: float | None = setting(
        None,
        "a step of a wrong answer is right where the mean result, from -1 to 1, of all answers that begin so is at "
        "least this; unset: labels stay",
        least=-1,
        most=1,
    )
    seed: int = setting(0, "of chance")


def main(config: ChangeConfig) -> None:
    """Write the changed answers and print how many are right."""
    if config.answers is None or config.output is None:
        raise UserError("--answers and --output are required")
    check_bounds(config)
    if not os.path.isfile(config.answers):
        raise UserError(f"--answers {config.answers}: no such file")
    rows = [row for _, row in read_json_rows(config.answers)]
    if not rows:
        raise UserError(f"--answers {config.answers}: it has no rows")
    rng = random.Random(config.seed)
    rows = fewer(rows, config.share, config.answers_per_problem)
    if config.right_per_wrong is not None:
        rows = rebalanced(rows, config.right_per_wrong, rng)
    rows = [turned(row) if rng.random() < config.wrong_labels else row for row in rows]
    if config.threshold is not None:
        rows = labelled_by_value(rows, config.threshold)
    if not rows:
        raise UserError("no answer is left: keep more")
    if config.equal_classes:
        rows = weighted(rows)
    write_rows(config.output, rows)
    print(f"{len(rows)} answers, {sum(map(is_right, rows))} right: {config.output}", flush=True)


def is_right(row: dict) -> bool:
    """The answer's label is its last step's."""
    return bool(row["labels"][-1])


def fewer(rows: list[dict], share: float, answers: int | None) -> list[dict]:
    """The rows of the first problems, as many as their ``share``, and of each the first ``answers``."""
    problems = list(dict.fromkeys(row["problem_id"] for row in rows))
    kept = set(problems[: max(1, round(share * len(problems)))])
    return [row for row in rows if row["problem_id"] in kept and (answers is None or row["sample"] < answers)]


def rebalanced(rows: list[dict], right_per_wrong: float, rng: random.Random) -> list[dict]:
    """As many rows as this ratio allows, in their order; which ones is drawn."""
    by_label = {label: [n for n, row in enumerate(rows) if is_right(row) == label] for label in (True, False)}
    wrong = min(len(by_label[False]), len(by_label[True]) / right_per_wrong)
    sizes = {True: round(wrong * right_per_wrong), False: round(wrong)}
    kept = sorted(n for label, places in by_label.items() for n in rng.sample(places, sizes[label]))
    return [rows[n] for n in kept]


def turned(row: dict) -> dict:
    """With every label the other way round."""
    return {**row, "labels": [not label for label in row["labels"]]}


def weighted(rows: list[dict]) -> list[dict]:
    """With weights of mean 1 that add up to the same for right and for wrong answers.

    Raises:
        UserError: one of the two has no answers.
    """
    right = sum(map(is_right, rows))
    if right in (0, len(rows)):
        raise UserError("--equal_classes: all answers have the same label")
    of_label = {True: len(rows) / (2 * right), False: len(rows) / (2 * (len(rows) - right))}
    return [{**row, "weight": of_label[is_right(row)]} for row in rows]


def labelled_by_value(rows: list[dict], threshold: float) -> list[dict]:
    """Labels of steps as the paper makes them of AlphaMath's Q.

    The value of a step is the mean result, from -1 to 1, of the problem's answers that begin with the steps up to it.
    All steps of a right answer are right; those of a wrong one are where their value is at least ``threshold``, but
    for the last.
    """
    results: dict[tuple, list[int]] = defaultdict(list)
    for row in rows:
        for prefix in _prefixes(row):
            results[prefix].append(1 if is_right(row) else -1)

    def labels(row: dict) -> list[bool]:
        if is_right(row):
            return [True] * len(row["labels"])
        found = [results[prefix] for prefix in _prefixes(row)[:-1]]
        return [sum(one) / len(one) >= threshold for one in found] + [False]

    return [{**row, "labels": labels(row)} for row in rows]


def _prefixes(row: dict) -> list[tuple]:
    return [(row["problem_id"], *row["completions"][: n + 1]) for n in range(len(row["completions"]))]


if __name__ == "__main__":
    sys.exit(run(main, ChangeConfig))
