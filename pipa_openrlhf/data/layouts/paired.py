"""Pairs: a better and a worse answer to one prompt, whole or in steps."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, join_rejected, make_record, read_answer, read_prompt
from pipa_openrlhf.data.record import FROM_SIDE, Record


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, chosen, rejected}``, with steps also ``rejected_labels`` (and ``chosen_labels``, default all 1)."""
    prompt = read_prompt(row, flags, where)
    chosen = join(prompt, read_answer(row, flags.chosen_key, where), flags, where)
    rejected = join_rejected(prompt, read_answer(row, flags.rejected_key, where), chosen, flags, where)
    chosen_labels = _optional_labels(row, "chosen_labels", chosen.answer, where)
    rejected_labels = _optional_labels(row, "rejected_labels", rejected.answer, where)
    if chosen_labels is None and rejected_labels is not None:
        chosen_labels = [1] * len(chosen.answer.steps)
    return [
        make_record(row, where, chosen, chosen_labels, 1, FROM_SIDE, pair_id=index),
        make_record(row, where, rejected, rejected_labels, 0, FROM_SIDE, pair_id=index),
    ]


def _optional_labels(row: dict, name: str, answer: Answer, where: str) -> list[int] | None:
    value = row.get(name)
    return None if value is None else fields.labels(value, name, len(answer.steps), where)
