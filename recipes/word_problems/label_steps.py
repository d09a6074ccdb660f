"""Label the steps of sampled answers by rule: rows of ``pipa_openrlhf.cli.sample`` to rows with step labels.

    python -m recipes.word_problems.label_steps --answers sampled.jsonl --problems problems.jsonl --output steps.jsonl

A step is a line of the answer. It is right while its equation holds and has the value of the worked answer's step at
that place; the last step has the answer's label. A row becomes ``{prompt, completions, labels}``.

With ``--by word`` a step is a word: right before the first one that is not the worked answer's, wrong at it, and 0 (no
label) after it. Such rows are read with ``--data.step_separator ''``.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass

from pipa_openrlhf.annotate.answers import split_steps
from pipa_openrlhf.annotate.equations import equation_value
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.problems import Problem, read_problems
from pipa_openrlhf.settings import setting
from recipes.word_problems.problems import write_rows
from recipes.word_problems.steps import is_right_throughout, label_steps, label_words, split_words


@dataclass(frozen=True)
class LabelConfig:
    """Of this script."""

    answers: str | None = setting(None, "JSONL that `sample` wrote")
    problems: str | None = setting(None, "JSONL of the same problems, with worked answers in `steps`")
    output: str | None = setting(None, "JSONL to write")
    by: str = setting("line", "what a step is", choices=("line", "word"))
    check_right: bool = setting(
        False, "of lines: an answer whose result is right and one of its steps is not counts as wrong from there on"
    )


def main(config: LabelConfig) -> None:
    """Label every answer and print how many steps are right."""
    for name in ("answers", "problems", "output"):
        path = getattr(config, name)
        if path is None:
            raise UserError(f"--{name} is required")
        if name != "output" and not os.path.isfile(path):
            raise UserError(f"--{name} {path}: no such file")
    if config.check_right and config.by != "line":
        raise UserError("--check_right is about lines: leave out --by word")
    problems = read_problems(config.problems)
    require_steps(problems, config.problems)
    worked = {problem.problem_id: problem.steps for problem in problems}
    rows = [labelled_row(row, worked, where, config) for where, row in read_json_rows(config.answers)]
    write_rows(config.output, rows)
    steps = Counter(label for row in rows for label in row["labels"])
    wrong = steps[False] if config.by == "line" else steps[-1]
    print(f"{len(rows)} answers: {steps[True]} right steps, {wrong} wrong steps: {config.output}", flush=True)


def labelled_row(row: dict, worked: dict[str, list[str]], where: str, config: LabelConfig) -> dict:
    """The row with its answer in steps.

    Raises:
        UserError: it is not a row of `sample`, or its problem is not in the file of problems.
    """
    if not isinstance(row.get("completion"), str) or not isinstance(row.get("label"), bool):
        raise UserError(f"{where}: needs `completion` and `label` as `sample` writes them")
    if row.get("problem_id") not in worked:
        raise UserError(f"{where}: problem {row.get('problem_id')!r} is not in --problems")
    gold_steps, is_right = worked[row["problem_id"]], row["label"]
    rest = {name: value for name, value in row.items() if name not in ("completion", "label")}
    if config.by == "line":
        steps = split_steps(row["completion"])
        is_right = is_right and (not config.check_right or is_right_throughout(steps, gold_steps))
        return {**rest, "completions": steps, "labels": label_steps(steps, gold_steps, is_right)}
    words = split_words(row["completion"])
    labels = [0 if label is None else 1 if label else -1 for label in label_words(words, gold_steps, is_right)]
    return {**rest, "completions": words, "labels": labels, "answer_label": is_right}


def require_steps(problems: list[Problem], path: str) -> None:
    """Refuse problems whose worked answers cannot label steps.

    Raises:
        UserError: a problem has no ``steps``, or none of its steps is a right equation.
    """
    for problem in problems:
        if problem.steps is None:
            raise UserError(f"{path}, problem {problem.problem_id}: step labels need its worked answer in `steps`")
        if not any(equation_value(step) is not None for step in problem.steps):
            raise UserError(f"{path}, problem {problem.problem_id}: `steps` holds no right equation to label steps by")


if __name__ == "__main__":
    sys.exit(run(main, LabelConfig))
