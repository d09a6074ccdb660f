"""Names under which public data have an answer and its label."""

import re

from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.prompts import CONVERSATIONS

# What a model wrote; and what is so called too, but is the reference where another column has the model's answer.
GENERATED = (
    "completion",
    "response",
    "output",
    "generation",
    "generated_solution",
    "generated_text",
    "model_output",
    "responses",
)
OR_REFERENCE = ("solution", "answer")
# The first five are labels by name; the others are where they hold 1/0 and the like.
LABELS = ("label", "is_correct", "correct", "final_answer_correct", "kto_tag", "acc", "score", "reward")
BY_NAME = LABELS[:5]
TEXTS = ("text", "content", *GENERATED[:-1], *OR_REFERENCE)
# A column of such a name may be the model's answer, which leaves `answer` to be the reference.
_BY_A_MODEL = re.compile(r"pred|generat|respon|output|rollout|completion|model", re.IGNORECASE)


def label_columns(row: dict) -> list[str]:
    """Columns that say whether an answer is right, the surest first."""
    return [
        name
        for name in LABELS
        if row.get(name) is not None and (fields.is_label(row[name]) or (name in BY_NAME and _is_single(row[name])))
    ]


def one_label(row: dict, place: str, where: str) -> int:
    """The label of a row, or of one answer in it; where two columns say it they must agree."""
    names = label_columns(row)
    if not names or row.get(LABELS[0], ...) is None:  # a label that is null is not to be had from a score
        present = (name for name in LABELS if name in row)
        name = next(present, LABELS[0])
        return fields.label(fields.column(row, name, f"{where}: {place}" if place else where), name, where)
    found = {name: fields.label(row[name], _at(place, name), where) for name in names}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{_at(place, name)!r} {fields.show(row[name])}" for name in found)
        fields.refuse(where, f"the labels disagree: {said}", "name the right one by --data.label_key, or correct it")
    return next(iter(found.values()))


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def answer_columns(row: dict) -> list[str]:
    """Columns that may hold the answer; more than one: it is not known which. None beside a whole conversation."""
    found = [name for name in GENERATED if _is_answer(row.get(name))]
    if found or any(fields.is_messages(row.get(name)) for name in CONVERSATIONS):
        return found
    references = [name for name in OR_REFERENCE if _is_answer(row.get(name))]
    others = [name for name in row if _BY_A_MODEL.search(name) and name not in LABELS and _is_answer(row[name])]
    return references + others if references else []


def _is_answer(value: object) -> bool:
    if isinstance(value, list):
        strings = all(isinstance(item, str) for item in value)
        return bool(value) and (strings or all(isinstance(item, dict) and _is_message(item) for item in value))
    return isinstance(value, str) or (isinstance(value, dict) and _is_message(value))


def _is_message(value: dict) -> bool:
    return "role" in value or "from" in value


def _is_single(value: object) -> bool:
    return not isinstance(value, (list, dict))
