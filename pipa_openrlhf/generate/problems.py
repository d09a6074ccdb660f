"""Read a file of problems: one JSON object a line, with a question and its answer."""

import json
import os
from dataclasses import dataclass
from itertools import islice

from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError

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


class RowFile:
    """Rows on disk, and the settings that made them in ``<path>.settings.json`` beside it.

    A file is continued only under the settings that it was begun with. A last line that was torn off when the process
    died is dropped.

    Raises:
        UserError: the file was made with other settings, or a line of it cannot be read.
    """

    def __init__(self, path: str, settings: dict):
        self.path = path
        self.rows: list[dict] = []
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        settings = json.loads(json.dumps(settings))
        settings_path = f"{path}.settings.json"
        if os.path.exists(path):
            _check_settings(path, settings_path, settings)
            self._read()
        else:
            with open(settings_path, "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=1)
                file.write("\n")

    def append(self, rows: list[dict]) -> None:
        """Add rows; they are on disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: not JSON; delete the line to continue") from error


def _check_settings(path: str, settings_path: str, settings: dict) -> None:
    try:
        with open(settings_path, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} exists and {settings_path} does not say how it was made: choose another") from error
    for name in settings | before:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path} was made with {name} {before.get(name)}, not {settings.get(name)}: "
                "choose another output, or delete this one"
            )
