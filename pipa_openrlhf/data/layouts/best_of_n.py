"""Several whole answers to one prompt, with a list of labels beside them."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import join, make_record, needed_prompt, to_answer
from pipa_openrlhf.data.record import Record

COLUMNS = ("answers", "labels")
READING = (
    "a record for each answer; `completions` with `labels` only by `--data.format best_of_n`, as they may be steps"
)
EXAMPLE = {"prompt": "1+1=", "answers": ["2", "3"], "labels": [1, 0]}
LISTS = ("answers", "responses", "generations", "samples", "solutions")


def _list_name(row: dict, names: tuple[str, ...]) -> str | None:
    return next(
        (name for name in names if isinstance(row.get(name), list) and not fields.is_messages(row[name])), None
    )


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has texts of answers and a list of labels."""
    name = _list_name(row, LISTS)
    return name is not None and isinstance(row.get("labels"), list) and all(isinstance(one, str) for one in row[name])


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, answers: [...], labels: [...]}``."""
    name = _list_name(row, (*LISTS, "completions"))
    if name is None:
        fields.refuse(where, "no list of answers", f"give one of {', '.join((*LISTS, 'completions'))}")
    answers, labels = row[name], fields.column(row, "labels", where)
    if not isinstance(labels, list) or len(labels) != len(answers):
        count = len(labels) if isinstance(labels, list) else "no list of"
        fields.refuse(where, f"{count} 'labels' for {len(answers)} answers", "give one label an answer")
    records = []
    for number, (value, label) in enumerate(zip(answers, labels)):
        answer = to_answer(value, f"{name}[{number}]", where)
        conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
        answer_label = fields.label(label, f"labels[{number}]", where)
        records.append(make_record(row, where, conversation, step_labels=None, answer_label=answer_label))
    return records
