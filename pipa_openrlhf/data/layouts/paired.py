"""Pairs: a better and a worse answer to one prompt, whole or in steps."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import step_dpo
from pipa_openrlhf.data.layouts.conversation import Answer, read_answer
from pipa_openrlhf.data.layouts.dialogue import is_dialogue
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import prompt_column, read_prompt
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.errors import UserError

COLUMNS = ("chosen", "rejected")
READING = (
    "a better and a worse answer, also as `chosen_response` and `rejected_response`, `preferred_output` and "
    "`non_preferred_output`, `response` and `rejected_response`, `response_j` and `response_k`; scores beside them "
    "are not read; without a prompt column the prompt is what both begin with"
)
EXAMPLE = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
# The better and the worse side, as public data name them.
SIDES = (
    COLUMNS,
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
    ("response_j", "response_k"),
)
# Parts of the name of a column that says itself which side is better.
PREFERENCE = ("prefer", "better", "winner", "choice")
# Characters of a prompt that no two answers begin with by chance.
LONG_PROMPT = 20


def sides(row: dict, flags: DataConfig) -> tuple[str, str] | None:
    """Names of the columns of the two sides: the flags' where the user changed them, else the first there are."""
    named = (flags.chosen_key, flags.rejected_key)
    known = (named,) if named != COLUMNS else SIDES
    present = [pair for pair in known if all(name in row for name in pair)]
    filled = (pair for pair in present if all(row[name] is not None for name in pair))
    return next(filled, present[0] if present else None)


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has two answers, and no steps that go before both."""
    return sides(row, flags) is not None and not step_dpo.fits(row, flags)


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Refuse sides that all repeat the prompt's text.

    Raises:
        UserError: they do, and the user did not say that they are answers by ``--data.format paired``.
    """
    if flags.format == "auto" and all(_repeats_prompt(row, flags) for row in rows):
        raise UserError(
            f"{dataset}: all answers begin with the text of their prompt; remove it from them, or leave out the "
            "prompt's column; or give --data.format paired if they say it again"
        )
    return flags


def _repeats_prompt(row: dict, flags: DataConfig) -> bool:
    """A few words may be the answer's own; the dialogue that HH-RLHF's texts repeat is left out when it is read."""
    name = prompt_column(row, flags)
    prompt = row.get(name) if name else None
    if not isinstance(prompt, str) or len(prompt.strip()) < LONG_PROMPT or is_dialogue(prompt, open_end=True):
        return False
    texts = [row.get(side) for side in sides(row, flags) or ()]
    return bool(texts) and all(isinstance(text, str) and text.startswith(prompt.strip()) for text in texts)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, chosen, rejected}``, with steps also ``rejected_labels`` (and ``chosen_labels``, default all 1)."""
    names = sides(row, flags) or (flags.chosen_key, flags.rejected_key)
    _refuse_own_preference(row, names, where, flags)
    chosen, rejected = (read_answer(row, name, where) for name in names)
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


def _refuse_own_preference(row: dict, names: tuple[str, str], where: str, flags: DataConfig) -> None:
    """The key flags must not overrule a column that says for each row which side is better."""
    if (flags.chosen_key, flags.rejected_key) == COLUMNS or flags.format != "auto":
        return
    others = {name: value for name, value in row.items() if name not in (*names, prompt_column(row, flags))}
    for name, value in others.items():
        if value is not None and (name in ("label", "labels") or any(part in name.lower() for part in PREFERENCE)):
            flag = f"--data.chosen_key {flags.chosen_key} --data.rejected_key {flags.rejected_key}"
            problem = f"{flag} name the sides, but {name!r} ({fields.show(value)}) may say which is better"
            fields.refuse(where, problem, "leave out these flags, or give --data.format paired if the flags are right")


def _optional_labels(row: dict, name: str, answer: Answer, flags: DataConfig, where: str) -> list[int | None] | None:
    value = row.get(name)
    if value is None:
        return None
    return fields.labels(value, name, len(answer.steps), where, flags.step_threshold, flags.neutral_step)
