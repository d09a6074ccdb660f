"""Pairs: a better and a worse answer to one prompt, whole or in steps."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import step_dpo
from pipa_openrlhf.data.layouts.conversation import Answer, read_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import read_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("chosen", "rejected")
READING = "a better and a worse answer; without a prompt column the prompt is what both begin with"
EXAMPLE = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has two answers, and no steps that go before both."""
    return flags.chosen_key in row and flags.rejected_key in row and not step_dpo.fits(row, flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, chosen, rejected}``, with steps also ``rejected_labels`` (and ``chosen_labels``, default all 1)."""
    chosen, rejected = (read_answer(row, name, where) for name in (flags.chosen_key, flags.rejected_key))
    chosen_labels = _optional_labels(row, "chosen_labels", chosen, flags, where)
    rejected_labels = _optional_labels(row, "rejected_labels", rejected, flags, where)
    if chosen_labels is None and rejected_labels is not None:
        chosen_labels = [1] * len(chosen.steps)
    return pair_records(
        row,
        where,
        index,
        flags,
        read_prompt(row, flags, where),
        chosen,
        rejected,
        chosen_labels=chosen_labels,
        rejected_labels=rejected_labels,
    )


def _optional_labels(row: dict, name: str, answer: Answer, flags: DataConfig, where: str) -> list[int | None] | None:
    value = row.get(name)
    if value is None:
        return None
    return fields.labels(value, name, len(answer.steps), where, flags.step_threshold, flags.neutral_step)
