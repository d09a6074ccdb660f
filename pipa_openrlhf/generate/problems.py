"""Read problems, in the layouts that they are published in, and write rows that are made of them."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TextIO

from pipa_openrlhf.data.json_rows import is_json_path, read_json_rows
from pipa_openrlhf.data.layouts.fields import column_names
from pipa_openrlhf.data.sources import read_table, rows_of
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.grading import last_boxed

_QUESTION_KEYS = ("question", "prompt", "problem")
_TYPE_KEYS = ("type", "subject")
_TABLES = (".parquet", ".csv", ".arrow")


@dataclass(frozen=True)
class Problem:
    """A question and its right answer.

    Attributes:
        steps: the worked answer; None where the file has none.
        level, type: as MATH has them; None where the file has none.
    """

    problem_id: str
    question: str
    answer: str
    steps: list[str] | None
    level: str | None = None
    type: str | None = None


def read_problems(path: str, most: int | None = None, split: str = "test", use_ms: bool = False) -> list[Problem]:
    """The first ``most`` problems (unset: all) of a file, a folder, or a data set of the hub.

    A row has ``question``, ``prompt`` or ``problem``, and ``answer`` (what follows its last ``####``, as in GSM8K,
    where it has one) or else ``solution`` with the answer in its last ``\\boxed{}``, as in MATH. It may have
    ``problem_id`` (default: the number of the row, from 1), ``steps``, ``level``, and ``type`` or ``subject``. Other
    columns are ignored.

    Args:
        split: of what has several; a file with one is read whole.

    Raises:
        UserError: no such data, no rows, a row that cannot be read, or a repeated ``problem_id``.
    """
    problems: dict[str, Problem] = {}
    for number, (where, row) in enumerate(read_rows(path, most, split, use_ms), start=1):
        problem = _parse(row, number, where)
        if problem.problem_id in problems:
            raise UserError(f"{where}: problem_id {problem.problem_id!r} was used before; make them differ")
        problems[problem.problem_id] = problem
    if not problems:
        raise UserError(f"--problems.file {path}: it has no rows; add some")
    return list(problems.values())


def read_rows(
    path: str, most: int | None, split: str = "test", use_ms: bool = False, flag: str = "--problems.file"
) -> Iterator[tuple[str, dict]]:
    """``(where, row)`` of the first ``most`` rows.

    Raises:
        UserError: there is no such data, or it cannot be read.
    """
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or is_json_path(path) or path.endswith(_TABLES)
    if not os.path.exists(path) and looks_local:
        raise UserError(f"{flag} {path}: no such file")
    if os.path.isfile(path) and not path.lower().endswith(_TABLES):
        yield from islice(read_json_rows(path, split), most)
        return
    try:
        table = read_table(path, split, sys.maxsize if most is None else most, use_ms)
    except UserError as error:  # which names the flags of training data
        message = str(error).replace("--data.dataset_split", "--problems.split").replace("--data.dataset", flag)
        raise UserError(message) from error
    yield from rows_of(path, table)


def digest_of(problems: list[Problem]) -> str:
    """Of the content, wherever it was read from."""
    return hashlib.sha256(json.dumps([asdict(problem) for problem in problems]).encode()).hexdigest()


def question_of(row: dict, where: str) -> str:
    """Raises UserError where the row has none."""
    question = next((row[key] for key in _QUESTION_KEYS if row.get(key) is not None), None)
    if not isinstance(question, str) or not question.strip():
        names = ", ".join(f"`{key}`" for key in _QUESTION_KEYS[:-1])
        raise UserError(f"{where}: needs a text column {names} or `{_QUESTION_KEYS[-1]}`; it has {column_names(row)}")
    return question


def _parse(row: dict, number: int, where: str) -> Problem:
    question, answer = question_of(row, where), _gold_answer(row, where)
    steps = row.get("steps")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise UserError(f"{where}: `steps` must be a list of texts, one a step")
    problem_id = row.get("problem_id")
    kind = next((row[key] for key in _TYPE_KEYS if row.get(key) is not None), None)
    return Problem(
        str(number if problem_id is None else problem_id),
        question,
        answer,
        steps,
        level=None if row.get("level") is None else str(row["level"]),
        type=None if kind is None else str(kind),
    )


def _gold_answer(row: dict, where: str) -> str:
    answer, solution = row.get("answer"), row.get("solution")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
        if not answer or not answer.strip():
            raise UserError(f"{where}: `solution` has no answer in \\boxed{{}}; add one, or a column `answer`")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise UserError(f"{where}: needs a column `answer` with a text or a number; it has {column_names(row)}")
    text = str(answer).rpartition("####")[2]
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip()
    if not text:
        raise UserError(f"{where}: `answer` is empty; give it a text or remove the row")
    return text


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
        if os.path.exists(path):
            _check_settings(path, settings)
            self._read()
        else:
            with open(f"{path}.settings.json", "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=1)
                file.write("\n")

    def append(self, rows: list[dict]) -> None:
        """Add rows; they are on disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            _write_rows(file, rows)
        self.rows += rows

    def reorder(self, place_of: Callable[[dict], Any]) -> None:
        """Write the rows anew, sorted by ``place_of``; at every moment the file has all of them."""
        self.rows.sort(key=place_of)
        new = f"{self.path}.new"
        with open(new, "w", encoding="utf-8") as file:
            _write_rows(file, self.rows)
        os.replace(new, self.path)

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


def _write_rows(file: TextIO, rows: list[dict]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())


def settings_of_rows(path: str) -> dict | None:
    """The settings that made a file of rows, as JSON has them; None where nothing says so."""
    try:
        with open(f"{path}.settings.json", encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _check_settings(path: str, settings: dict) -> None:
    before = settings_of_rows(path)
    if before is None:
        raise UserError(f"{path} exists and {path}.settings.json does not say how it was made: choose another")
    for name in settings | before:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path} was made with {name} {before.get(name)}, not {settings.get(name)}: "
                "choose another output, or delete this one"
            )
