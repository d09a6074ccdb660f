"""What every layout of pairs shares: two answers to one prompt, made into two records."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.layouts.dialogue import as_messages, is_dialogue
from pipa_openrlhf.data.layouts.shared_prompt import take_prompt
from pipa_openrlhf.data.record import FROM_SIDE, Record

LONG_PROMPT = 16  # characters; two answers that begin with so much of the prompt do not by chance


def pair_records(
    row: dict,
    where: str,
    index: int,
    flags: DataConfig,
    prompt: str | list[dict] | None,
    chosen: Answer,
    rejected: Answer,
    *,
    chosen_labels: list[int | None] | None = None,
    rejected_labels: list[int | None] | None = None,
    prefix: str = "",
    complete: bool = True,
) -> list[Record]:
    """The chosen and the rejected record of one row.

    Without a prompt, and for whole conversations, it is what both sides begin with: see :func:`take_prompt`.

    Args:
        complete: False: the sides are the next step of an answer that goes on, so that no label of a whole answer is
            known: only which side it is.
    """
    whole = is_whole(chosen) and is_whole(rejected)
    if isinstance(prompt, str) and len(prompt) >= LONG_PROMPT:
        if all(one.messages is None and one.steps[0].startswith(prompt) for one in (chosen, rejected)):
            remedy = "remove it from both, or leave out the column of the prompt"
            fields.refuse(where, f"{chosen.name!r} and {rejected.name!r} begin with the prompt", remedy)
    if prompt is None or (whole and flags.apply_chat_template):
        prompt, chosen, rejected = take_prompt(row, prompt, chosen, rejected, flags, where)
    elif isinstance(prompt, str) and flags.apply_chat_template and is_dialogue(prompt, open_end=True):
        prompt = as_messages(prompt)
    return [
        make_record(
            row,
            where,
            join(prompt, answer, flags, where, prefix),
            step_labels=step_labels,
            answer_label=side if complete else None,
            label_source=FROM_SIDE,
            complete=complete,
            pair_id=index,
            side=side,
            masked_spans=answer.masked,
        )
        for side, answer, step_labels in ((1, chosen, chosen_labels), (0, rejected, rejected_labels))
    ]


def is_whole(answer: Answer) -> bool:
    """Whether it is a whole conversation, which begins with the prompt."""
    return answer.messages is not None and answer.messages[0]["role"] != "assistant"
