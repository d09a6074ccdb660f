"""What every layout of pairs shares: two answers to one prompt, made into two records."""

import re
from dataclasses import replace

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.record import FROM_SIDE, Record

LONG_PROMPT = 16  # characters; two answers that begin with so much of the prompt do not by chance
# Where a dialogue written as text hands over to the model.
ASSISTANT_TURN = "\n\nAssistant:"


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

    Without a prompt, and for whole conversations beside a text prompt, it is what both sides begin with: see
    :func:`shared_text` and :func:`shared_messages`.

    Args:
        complete: False: the sides are the next step of an answer that goes on, so that no label of a whole answer is
            known: only which side it is.
    """
    whole = is_whole(chosen) and is_whole(rejected)
    if isinstance(prompt, str) and len(prompt) >= LONG_PROMPT:
        if all(one.messages is None and one.steps[0].startswith(prompt) for one in (chosen, rejected)):
            remedy = "remove it from both, or leave out the column of the prompt"
            fields.refuse(where, f"{chosen.name!r} and {rejected.name!r} begin with the prompt", remedy)
    if prompt is None or (isinstance(prompt, str) and whole and flags.apply_chat_template):
        prompt, chosen, rejected = _take_prompt(chosen, rejected, flags, where)
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
        )
        for side, answer, step_labels in ((1, chosen, chosen_labels), (0, rejected, rejected_labels))
    ]


def is_whole(answer: Answer) -> bool:
    """Whether it is a whole conversation, which begins with the prompt."""
    return answer.messages is not None and answer.messages[0]["role"] != "assistant"


def _take_prompt(
    chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> tuple[str | list[dict] | None, Answer, Answer]:
    if chosen.messages is not None and rejected.messages is not None and flags.apply_chat_template:
        if len(chosen.messages) == 1:
            remedy = "start it with the user's message or add 'prompt'"
            fields.refuse(where, f"{chosen.name!r} has no prompt", remedy)
        count = shared_messages(chosen.messages, rejected.messages)
        if not count:
            problem = f"{rejected.name!r} does not start with the prompt of {chosen.name!r}"
            fields.refuse(where, problem, "make their messages before the answer the same")
        rest = (
            replace(chosen, messages=chosen.messages[count:]),
            replace(rejected, messages=rejected.messages[count:]),
        )
        return chosen.messages[:count], *rest
    for one in (chosen, rejected):
        if one.messages is None and one.steps[-1].rstrip().endswith(ASSISTANT_TURN):
            problem = f"{one.name!r} ends where its answer should begin, with {ASSISTANT_TURN.strip()!r}"
            fields.refuse(where, problem, "give it an answer or remove the row")
    if chosen.messages is None and rejected.messages is None and len(chosen.steps) == len(rejected.steps) == 1:
        count = shared_text(chosen.steps[0], rejected.steps[0])
        if count and not flags.apply_chat_template:
            rest = (
                replace(chosen, steps=[chosen.steps[0][count:]]),
                replace(rejected, steps=[rejected.steps[0][count:]]),
            )
            return chosen.steps[0][:count], *rest
    return None, chosen, rejected


def shared_messages(chosen: list[dict], rejected: list[dict]) -> int:
    """How many messages both begin with, at least one being left on each side, the first of them an assistant's."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((number for number in range(most) if chosen[number] != rejected[number]), most)
    while count and not chosen[count]["role"] == rejected[count]["role"] == "assistant":
        count -= 1
    return count


def shared_text(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their prompt: up to the last ``\\n\\nAssistant:`` that both begin with, or
    else up to the last space or line end, which goes with the answer; at least one character is left on each side."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((number for number in range(most) if chosen[number] != rejected[number]), max(most, 0))
    turn = chosen.rfind(ASSISTANT_TURN, 0, common)
    if turn >= 0:
        return turn + len(ASSISTANT_TURN)
    last_space = list(re.finditer(r"\s+", chosen[: common + 1]))
    return last_space[-1].start() if last_space else 0
