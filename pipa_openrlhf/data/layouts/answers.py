"""Several whole answers to one problem, each right or wrong."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields, rollouts
from pipa_openrlhf.data.layouts.answer_columns import TEXTS, label_columns, one_label
from pipa_openrlhf.data.layouts.conversation import join, make_record, needed_prompt, to_answer
from pipa_openrlhf.data.record import Record

COLUMNS = ("prompt", "answers", "labels")
READING = (
    "a record for each answer: `answers`, `responses`, `generations`, ... are texts beside a list of labels, or "
    "objects with a text and `is_correct`"
)
EXAMPLE = {"prompt": "1+1=", "answers": ["2", "3"], "labels": [1, 0]}
LISTS = ("answers", "responses", "solutions", "generations", "samples", "rollouts", "outputs")
# `completions` with `labels` may be steps: see best_of_n.
OBJECTS = (*LISTS, "completions")
LABELS = (
    *("labels", "label", "is_correct", "correct", "correctness", "correctness_math_verify", "acc"),
    *("rewards", "scores", "reward", "score"),
)
ENDED = "is_reasoning_complete"


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there is a list of objects with text and label, or of texts with a list of labels beside it."""
    if any(_are_objects(row.get(name)) for name in OBJECTS):
        return not rollouts.fits(row, flags)
    return _texts_name(row) is not None and _labels_name(row, flags) is not None


def _are_objects(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(one, dict) and _text_name(one) for one in value):
        return False
    return any(map(label_columns, value))  # where one lacks its label, reading says so


def _text_name(one: dict) -> str | None:
    return next((name for name in TEXTS if isinstance(one.get(name), str)), None)


def _texts_name(row: dict) -> str | None:
    names = LISTS if "labels" in row else OBJECTS
    return next((name for name in names if _are_texts(row.get(name))), None)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _labels_name(row: dict, flags: DataConfig) -> str | None:
    names = (flags.label_key,) if flags.label_key else LABELS
    found = (name for name in names if isinstance(row.get(name), list))
    return next((name for name in found if all(map(fields.is_label, row[name])) or name in LABELS[:2]), None)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, answers: [...], labels: [...]}`` and ``{problem, responses: [{text, is_correct}, ...]}``."""
    name = next((name for name in OBJECTS if _are_objects(row.get(name))), None)
    if name is not None:
        return [labelled_answer(row, one, f"{name}[{number}]", where, flags) for number, one in enumerate(row[name])]
    name, labels_name = _texts_name(row), _labels_name(row, flags)
    if name is None or labels_name is None:
        problem = f"no list of answers ({', '.join(LISTS)}) with a list of labels beside it"
        fields.refuse(where, problem, "add them, or remove the row")
    return one_each(row, name, labels_name, where, flags)


def labelled_answer(row: dict, one: dict, place: str, where: str, flags: DataConfig) -> Record:
    """The record of an object with a text and a label."""
    name = _text_name(one)
    if name is None:
        fields.refuse(where, f"{place!r} has no text", f"give {', '.join(map(repr, TEXTS[:3]))} or the like")
    label = one_label(one, place, where)
    return _record(row, one[name], label, f"{place}.{name}", where, flags)


def one_each(row: dict, name: str, labels_name: str, where: str, flags: DataConfig) -> list[Record]:
    """A record for each answer of a list, with the label of the same place in the other."""
    answers, labels = fields.column(row, name, where), fields.column(row, labels_name, where)
    if not isinstance(answers, list) or not answers:
        fields.refuse(where, f"{name!r} is {fields.show(answers)}", "give a list of answers or remove the row")
    if not isinstance(labels, list) or len(labels) != len(answers):
        count = len(labels) if isinstance(labels, list) else fields.show(labels)
        fields.refuse(where, f"{count} {labels_name!r} for {len(answers)} answers", "give one label an answer")
    ended = row.get(ENDED) if labels_name == "correctness_math_verify" else None
    ends = ended if isinstance(ended, list) and len(ended) == len(answers) else [True] * len(answers)
    return [
        _record(
            row,
            answer,
            fields.label(label, f"{labels_name}[{number}]", where),
            f"{name}[{number}]",
            where,
            flags,
            complete=end is not False,
        )
        for number, (answer, label, end) in enumerate(zip(answers, labels, ends, strict=True))
    ]


def _record(
    row: dict, text: object, label: int, place: str, where: str, flags: DataConfig, complete: bool = True
) -> Record:
    answer = to_answer(text, place, where)
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    return make_record(row, where, conversation, step_labels=None, answer_label=label, complete=complete)
