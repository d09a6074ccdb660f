"""Where two annotators agree: answers whose first wrong step both see at the same place."""

from collections import Counter
from dataclasses import dataclass

from pipa_openrlhf.annotate.answers import NO_ERROR
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.problems import read_rows

_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Annotated:
    """A row that was annotated before.

    Attributes:
        key: question and steps, which tell it from the others of its file.
        first_error: index of the first wrong step, -1 where none is.
    """

    key: _Key
    first_error: int
    row: dict


def read_annotated(path: str, flag: str) -> list[Annotated]:
    """The rows of a file that ``annotate`` wrote, or of stepwise rows.

    Raises:
        UserError: there is no such file, no row, a row without steps and labels, or an answer with two first errors.
    """
    rows = []
    errors: dict[_Key, int] = {}
    for where, row in read_rows(path, None, flag=flag):
        one = _read(row, where)
        if errors.setdefault(one.key, one.first_error) != one.first_error:
            raise UserError(f"{where}: the same answer with another first error stands above; remove one of them")
        rows.append(one)
    if not rows:
        raise UserError(f"{flag} {path}: it has no rows; add some")
    return rows


def agreed(first: list[Annotated], second: list[Annotated]) -> tuple[list[dict], Counter[str]]:
    """The rows of ``first`` where both say the same, and counts of what was found."""
    errors = {one.key: one.first_error for one in second}
    counts: Counter[str] = Counter()
    rows = []
    for one in first:
        other = errors.get(one.key)
        if other is None:
            counts["only in the first file"] += 1
        elif other == one.first_error:
            counts["agree on no error" if other == NO_ERROR else "agree on the first error"] += 1
            rows.append(one.row)
        elif NO_ERROR in (other, one.first_error):
            counts["only one sees an error"] += 1
        else:
            counts["see it at different steps"] += 1
    counts["only in the second file"] = len(errors.keys() - {one.key for one in first})
    return rows, counts


def _read(row: dict, where: str) -> Annotated:
    steps, labels = row.get("completions"), row.get("labels")
    if "output" in row:
        path = row["output"]
        if not isinstance(path, list) or not all(isinstance(node, dict) for node in path):
            fields.refuse(where, "'output' is no list of steps", "give a file that annotate wrote")
        steps, labels = [node.get("step") for node in path], None
    question = row.get("prompt", row.get("instruction"))
    if not isinstance(question, str) or not isinstance(steps, list):
        names = fields.column_names(row)
        fields.refuse(where, f"no annotated answer (columns: {names})", "give a file that annotate wrote")
    steps = fields.steps(steps, "completions", where)
    first_error = row.get("first_error")
    if first_error is None and isinstance(labels, list):
        if len(labels) != len(steps):
            fields.refuse(where, f"{len(steps)} steps and {len(labels)} labels", "give each step a label")
        given = [fields.label(label, f"labels[{number}]", where) for number, label in enumerate(labels)]
        first_error = given.index(0) if 0 in given else NO_ERROR
    if isinstance(first_error, bool) or not isinstance(first_error, int):
        fields.refuse(where, "needs a whole number in 'first_error', or 'labels'", "annotate it anew")
    if not NO_ERROR <= first_error < len(steps):
        fields.refuse(where, f"'first_error' is {first_error}, of {len(steps)} steps", "annotate it anew")
    return Annotated((question, tuple(steps)), first_error, row)
