"""Step-DPO: the right steps so far, a better and a worse next step, and the whole answers that follow from them."""

import re

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import prompt_column, read_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("prompt", "initial_reason_steps", "chosen", "rejected")
READING = (
    "a better and a worse next step after the steps so far, which belong to the prompt; with `--data.whole_answers` "
    "the whole answers, in which the steps so far are right, and the others by their side"
)
EXAMPLE = {
    "prompt": "1+1+1=",
    "initial_reason_steps": "Step 1: 1+1=2\nStep 2:",
    "chosen": " 2+1=3",
    "rejected": " 2+1=4",
    "full_chosen": " 2+1=3\nStep 3: It is 3.",
    "full_rejected": " 2+1=4\nStep 3: It is 4.",
}
STEPS_SO_FAR = ("initial_reason_steps", "prefix")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are two sides and the steps before them."""
    sides = flags.chosen_key in row and flags.rejected_key in row
    return sides and (STEPS_SO_FAR[0] in row or (STEPS_SO_FAR[1] in row and prompt_column(row, flags) is not None))


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, initial_reason_steps, chosen, rejected}``; the pipeline's own files say ``prefix``."""
    name = STEPS_SO_FAR[0] if STEPS_SO_FAR[0] in row else STEPS_SO_FAR[1]
    so_far = fields.optional_text(row, name, where)
    prompt = read_prompt(row, flags, where)
    if prompt is None:
        fields.column(row, "prompt", where)
    if flags.whole_answers:
        chosen, chosen_labels = _whole(row, "full_chosen", so_far, 1, flags, where)
        rejected, rejected_labels = _whole(row, "full_rejected", so_far, 0, flags, where)
    else:
        chosen, chosen_labels = Answer(flags.chosen_key, [_side(row, flags.chosen_key, where)]), [1]
        rejected, rejected_labels = Answer(flags.rejected_key, [_side(row, flags.rejected_key, where)]), [0]
    return pair_records(
        row,
        where,
        index,
        flags,
        prompt,
        chosen,
        rejected,
        chosen_labels=chosen_labels,
        rejected_labels=rejected_labels,
        prefix="" if flags.whole_answers else so_far,
        complete=flags.whole_answers,
    )


def _side(row: dict, name: str, where: str) -> str:
    text = fields.text(fields.column(row, name, where), name, where)
    if not text.strip():
        fields.refuse(where, f"{name!r} is empty", "give it text or remove the row")
    return text


def _whole(
    row: dict, name: str, so_far: str, side: int, flags: DataConfig, where: str
) -> tuple[Answer, list[int | None]]:
    """The steps so far and what follows, cut where a line begins with "Step": joined they are the same text."""
    if row.get(name) is None:
        fields.refuse(where, f"no {name!r}", "add it, or leave out --data.whole_answers")
    text = so_far + _side(row, name, where)
    marks = re.finditer(re.escape(flags.step_separator) + r"(?=Step \d)", text)
    cuts = [mark.start() for mark in marks if text[: mark.start()].strip()]
    starts = [0, *(cut + len(flags.step_separator) for cut in cuts)]
    steps = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
    # A step that ends within the steps so far; the last of these may go on in what follows ("Step 3:").
    right = sum(cut <= len(so_far) for cut in cuts)
    return Answer(name, steps), [*[1] * right, *[side] * (len(steps) - right)]
