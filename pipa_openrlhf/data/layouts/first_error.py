"""Answers of which the data say where the first error is.

ProcessBench, BIG-Bench Mistake, MR-GSM8K, PRMBench, and the students' solutions of "verify-then-generate".
"""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import labelled_record, until_error
from pipa_openrlhf.data.record import Record

COLUMNS = ("steps or student_incorrect_solution", "label, mistake_index or incorrect_index")
READING = (
    "one answer and the index of its first wrong step; the steps after it by `--data.after_first_error`; the answer's "
    "own label is the data's (`final_answer_correct`, `answer` equal to `target`, ...), whatever the steps say; "
    "PRMBench names every wrong step and has the right answer beside it"
)
EXAMPLE = {"problem": "1+1+1=", "steps": ["1+1=2", "2+1=4"], "final_answer_correct": False, "label": 1}
MR_STEPS, MR_FIRST = "model_output_steps", "model_output_solution_first_error_step"
MR_SOLUTION, MR_ANSWER = "model_output_solution_correctness", "model_output_answer_correctness"
STUDENT, STUDENT_FIRST = "student_incorrect_solution", "incorrect_index"
NO_ERROR = ("", "n/a", "na", "none", "null", "-1")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has the columns of one of the five."""
    if "modified_process" in row and "error_steps" in row:
        return True
    if (MR_STEPS in row and MR_FIRST in row) or (STUDENT in row and STUDENT_FIRST in row):
        return True
    named = "mistake_index" in row or ("final_answer_correct" in row and "label" in row)
    return named and isinstance(row.get("steps"), list)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """One record; of PRMBench's rows two."""
    if "modified_process" in row:
        return _prmbench(row, where, flags)
    if MR_STEPS in row:
        return [_record(row, where, flags, MR_STEPS, MR_FIRST, _mr_first(row, where), _mr_answer(row, where))]
    if STUDENT in row:  # all of them are wrong, as the name says
        first = _index(fields.column(row, STUDENT_FIRST, where), STUDENT_FIRST, where)
        return [_record(row, where, flags, STUDENT, STUDENT_FIRST, first, 0)]
    if "mistake_index" in row:
        first = _index(row.get("mistake_index"), "mistake_index", where)
        return [_record(row, where, flags, "steps", "mistake_index", first, _equals_target(row))]
    first = _index(fields.column(row, "label", where), "label", where)
    return [_record(row, where, flags, "steps", "label", first, _label(row, "final_answer_correct", where))]


def _record(
    row: dict, where: str, flags: DataConfig, name: str, index_name: str, first: int | None, answer_label: int | None
) -> Record:
    steps = _list(row, name, where)
    labels = until_error(len(steps), first, index_name, where, flags)
    given = answer_label is not None
    return labelled_record(row, where, flags, steps, labels, name=name, answer_label=answer_label, given=given)


def _list(row: dict, name: str, where: str) -> list:
    steps = fields.column(row, name, where)
    if not isinstance(steps, list):
        fields.refuse(where, f"{name!r} is {fields.show(steps)}", "give a list with one text a step")
    return steps


def _index(value: object, name: str, where: str) -> int | None:
    """A whole number, of which -1 is no error, as is null; the text of a number counts as one."""
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_ERROR) or value == -1:
        return None
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, float) and number.is_integer():  # a column with nulls
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give the number of the first wrong step, or null")
    return number


def _label(row: dict, name: str, where: str) -> int | None:
    value = row.get(name)
    return None if value is None else fields.label(value, name, where)


def _equals_target(row: dict) -> int | None:
    """Whether the answer is the target; one that was not found is wrong, without a target nothing is known."""
    answer, target = row.get("answer"), row.get("target")
    return None if target is None else int(" ".join(str(answer).split()) == " ".join(str(target).split()))


def _mr_first(row: dict, where: str) -> int | None:
    """MR-GSM8K counts steps from 1, and says besides whether the solution is right."""
    first = _index(row.get(MR_FIRST), MR_FIRST, where)
    first = None if not first else first - 1
    right = _label(row, MR_SOLUTION, where)
    if right is not None and right != (first is None):
        problem = (
            f"{MR_SOLUTION!r} is {fields.show(row[MR_SOLUTION])} beside {MR_FIRST!r} {fields.show(row[MR_FIRST])}"
        )
        fields.refuse(where, problem, "correct one of them or remove the row")
    return first


def _mr_answer(row: dict, where: str) -> int | None:
    """A right solution has a right answer; a wrong one may have one too."""
    given = _label(row, MR_ANSWER, where)
    return given if given is not None or _label(row, MR_SOLUTION, where) == 0 else 1


def _prmbench(row: dict, where: str, flags: DataConfig) -> list[Record]:
    """The modified answer, whose wrong steps are named (from 1), and the right one that it was made from."""
    steps, wrong = _list(row, "modified_process", where), _list(row, "error_steps", where)
    for number in wrong:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(steps):
            problem = f"'error_steps' names step {fields.show(number)} of {len(steps)}"
            fields.refuse(where, problem, "steps are counted from 1; correct it or remove the row")
    answers: list[tuple[str, list[int | None]]] = [
        ("modified", [int(number + 1 not in wrong) for number in range(len(steps))])
    ]
    if row.get("original_process") is not None:
        answers.append(("original", [1] * len(_list(row, "original_process", where))))
    return [
        labelled_record(
            row,
            where,
            flags,
            _list(row, f"{kind}_process", where),
            labels,
            name=f"{kind}_process",
            answer_label=1 if 0 not in labels else None,
            prompt=_prmbench_prompt(row, f"{kind}_question", where),
        )
        for kind, labels in answers
    ]


def _prmbench_prompt(row: dict, name: str, where: str) -> str | None:
    return fields.optional_text(row, name, where) or None
