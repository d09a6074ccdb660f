"""The prompt of pairs that have none beside them: what both sides begin with."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer
from pipa_openrlhf.data.layouts.dialogue import hand_over, style_of
from pipa_openrlhf.data.layouts.prompts import complete_prompt

Split = tuple[str | list[dict] | None, Answer, Answer]


def take_prompt(
    row: dict, prompt: str | list[dict] | None, chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> Split:
    """Prompt and answers, from texts or messages that may hold both.

    Args:
        prompt: the row's own, beside whole conversations.
    """
    if chosen.messages is not None and rejected.messages is not None and flags.apply_chat_template:
        shared, chosen, rejected = _split_messages(prompt, chosen, rejected, where)
        return complete_prompt(row, "", shared, flags, where), chosen, rejected
    if flags.apply_chat_template or any(one.messages is not None or len(one.steps) > 1 for one in (chosen, rejected)):
        return None, chosen, rejected
    text, chosen, rejected = _split_text(chosen, rejected, where)
    return complete_prompt(row, "", text, flags, where) if text else None, chosen, rejected


def after(answer: Answer, count: int) -> Answer:
    """What follows the first ``count`` characters of a text."""
    return replace(answer, steps=[answer.steps[0][count:], *answer.steps[1:]])


def _split_text(chosen: Answer, rejected: Answer, where: str) -> tuple[str, Answer, Answer]:
    """The prompt ends where the last turn that both begin with hands over to the model, or else at the last space or
    line end, which goes with the answers."""
    better, worse = chosen.steps[0], rejected.steps[0]
    parted = _first_difference(better, worse)
    count = hand_over(better, parted)
    if count:
        style = style_of(better[:count])
        if style is not None and style.others.search(better, count, parted):
            _refuse_parting(chosen, rejected, "human", where)
    elif hand_over(better, len(better)) and hand_over(worse, len(worse)):
        _refuse_parting(chosen, rejected, "human", where)
    else:
        # One character at least is left on each side.
        spaces = list(re.finditer(r"\s+", better[: min(parted + 1, len(better), len(worse))]))
        count = spaces[-1].start() if spaces else 0
    return better[:count], after(chosen, count), after(rejected, count)


def _split_messages(
    prompt: str | list[dict] | None, chosen: Answer, rejected: Answer, where: str
) -> tuple[list[dict], Answer, Answer]:
    """The prompt is all that both begin with, but for turns of the model that one of them would begin with."""
    better, worse = chosen.messages or [], rejected.messages or []
    if len(better) == 1:
        fields.refuse(where, f"{chosen.name!r} has no prompt", "start it with the user's message or add 'prompt'")
    parted = _first_difference(better, worse)
    count = min(parted, len(better) - 1, len(worse) - 1)
    while count and not better[count]["role"] == worse[count]["role"] == "assistant":
        count -= 1
    if not count:
        problem = f"{rejected.name!r} does not start with the prompt of {chosen.name!r}"
        fields.refuse(where, problem, "make their messages before the answer the same")
    if count < parted < min(len(better), len(worse)):
        _refuse_parting(chosen, rejected, better[parted]["role"], where)
    shared = better[:count]
    if isinstance(prompt, list):
        shared = _overlapping(prompt, shared, (chosen, rejected), where)
    return shared, replace(chosen, messages=better[count:]), replace(rejected, messages=worse[count:])


def _overlapping(prompt: list[dict], shared: list[dict], sides: tuple[Answer, Answer], where: str) -> list[dict]:
    """The prompt of conversations that begin with ``shared``, beside another, which it may repeat or go on from."""
    if prompt in (shared[: len(prompt)], shared[-len(prompt) :], *(one.messages for one in sides)):
        return shared
    most = min(len(prompt), len(shared))
    repeated = next((count for count in range(most, 0, -1) if prompt[-count:] == shared[:count]), 0)
    if not repeated and (prompt[-1]["role"] == "user" or shared[0]["role"] != "user"):
        problem = (
            f"the conversations of {' and '.join(repr(one.name) for one in sides)} do not go on from the prompt's"
        )
        fields.refuse(where, problem, "make their messages before the answer the same, or leave one of them out")
    return prompt + shared[repeated:]


def _refuse_parting(chosen: Answer, rejected: Answer, role: str, where: str) -> NoReturn:
    """What the model says before that, in both, would be right and wrong at once."""
    problem = f"{chosen.name!r} and {rejected.name!r} part in a {role} turn"
    fields.refuse(where, problem, "let them part in the assistant's, or remove the row")


def _first_difference(chosen: Sequence, rejected: Sequence) -> int:
    """Where two sequences part; the length of the shorter where it begins the other."""
    same, most = 0, min(len(chosen), len(rejected))
    while same < most:  # by halves: slices are compared at once
        middle = (same + most + 1) // 2
        if chosen[same:middle] == rejected[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
