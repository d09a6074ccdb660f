"""Read a file of problems: one JSON object a line, with a question and its answer."""

import os
from dataclasses import dataclass
from itertools import islice

from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluation.equations import equation_value

_QUESTION_KEYS = ("question", "prompt")


@dataclass(frozen=True)
class Problem:
    """A question and its right answer; ``steps`` is the worked answer, None where the file has none."""

    problem_id: str
    question: str
    answer: str
    steps: list[str] | None


def read_problems(path: str, most: int | None = None) -> list[Problem]:
    """The first ``most`` problems of a JSONL file or a JSON list (unset: all).

    A row has ``question`` or ``prompt``, ``answer`` (what follows its last ``####``, as in GSM8K, where it has one),
    and optionally ``problem_id`` (default: the number of the row, from 1) and ``steps``. Other columns are ignored.

    Raises:
        UserError: no such file, no rows, a row that cannot be read, or a repeated ``problem_id``.
    """
    if not os.path.isfile(path):
        raise UserError(f"--problems.file {path}: no such file")
    problems: dict[str, Problem] = {}
    for number, (where, row) in enumerate(islice(read_json_rows(path), most), start=1):
        problem = _parse(row, number, where)
        if problem.problem_id in problems:
            raise UserError(f"{where}: problem_id {problem.problem_id!r} was used before; make them differ")
        problems[problem.problem_id] = problem
    return list(problems.values())


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


def _parse(row: dict, number: int, where: str) -> Problem:
    question = next((row[key] for key in _QUESTION_KEYS if key in row), None)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: needs a text column `question` or `prompt`; it has {_names(row)}")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise UserError(f"{where}: needs a column `answer` with a text or a number; it has {_names(row)}")
    answer = str(answer).rpartition("####")[2].strip()
    if not answer:
        raise UserError(f"{where}: `answer` is empty; give it a text or remove the row")
    steps = row.get("steps")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise UserError(f"{where}: `steps` must be a list of texts, one a step")
    return Problem(str(row.get("problem_id", number)), question, answer, steps)


def _names(row: dict) -> str:
    return ", ".join(row) or "no columns"
