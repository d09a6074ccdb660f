"""Single answers, each with a label for the whole."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import join, make_record, needed_prompt, read_answer
from pipa_openrlhf.data.record import FROM_COLUMN, Record

COLUMNS = ("completion", "label")


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completion, label}``: one answer, right or wrong."""
    answer = read_answer(row, "completion", where)
    answer_label = fields.label(fields.column(row, "label", where), "label", where)
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    return [make_record(row, where, conversation, None, answer_label, FROM_COLUMN)]
