"""The prompt of pairs that have none beside them: what both sides begin with."""

import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import Answer
from pipa_openrlhf.data.layouts.dialogue import hand_over, human_turns
from pipa_openrlhf.data.layouts.prompts import complete_prompt


def take_prompt(
    row: dict, prompt: str | list[dict] | None, chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> tuple[str | list[dict] | None, Answer, Answer]:
    """Prompt and answers, from texts or messages that may hold both.

    Args:
        prompt: the row's own, beside whole conversations.
    """
    if chosen.messages is not None and rejected.messages is not None and flags.apply_chat_template:
        return _take_messages(row, prompt, (chosen, chosen.messages), (rejected, rejected.messages), flags, where)
    if chosen.messages is None and rejected.messages is None and len(chosen.steps) == len(rejected.steps) == 1:
        count = shared_text(chosen.steps[0], rejected.steps[0])
        if count and not flags.apply_chat_template:
            if human_turns(os.path.commonprefix([one.steps[0][count:] for one in (chosen, rejected)])):
                _refuse_parting(chosen, rejected, "human", where)
            for one in (chosen, rejected):
                if not one.steps[0][count:].strip():
                    fields.refuse(where, f"{one.name!r} is empty after the prompt", "give it text or remove the row")
            rest = (
                replace(chosen, steps=[chosen.steps[0][count:]]),
                replace(rejected, steps=[rejected.steps[0][count:]]),
            )
            return complete_prompt(row, "", chosen.steps[0][:count], flags, where), *rest
    return None, chosen, rejected


def _take_messages(
    row: dict,
    prompt: str | list[dict] | None,
    chosen: tuple[Answer, list[dict]],
    rejected: tuple[Answer, list[dict]],
    flags: DataConfig,
    where: str,
) -> tuple[list[dict], Answer, Answer]:
    (better, messages), (worse, others) = chosen, rejected
    for one, own in (chosen, rejected):
        if own[-1]["role"] != "assistant":
            fields.refuse(where, f"{one.name!r} ends with a {own[-1]['role']} message", "end with the assistant's")
    if len(messages) == 1:
        fields.refuse(where, f"{better.name!r} has no prompt", "start it with the user's message or add 'prompt'")
    count = shared_messages(messages, others)
    if not count:
        problem = f"{worse.name!r} does not start with the prompt of {better.name!r}"
        fields.refuse(where, problem, "make their messages before the answer the same")
    parted = _first_difference(messages, others)
    if count < parted < min(len(messages), len(others)):
        _refuse_parting(better, worse, messages[parted]["role"], where)
    shared = messages[:count]
    if isinstance(prompt, list) and prompt not in (messages, others):
        whole = _overlapping(prompt, shared)
        if whole is None:
            problem = f"the conversations of {better.name!r} and {worse.name!r} do not go on from the prompt's"
            fields.refuse(where, problem, "make their messages before the answer the same, or leave one of them out")
        shared = whole
    whole_prompt = complete_prompt(row, "", shared, flags, where)
    assert isinstance(whole_prompt, list)
    return (
        whole_prompt,
        replace(better, messages=messages[count:]),
        replace(worse, messages=others[count:]),
    )


def _refuse_parting(chosen: Answer, rejected: Answer, role: str, where: str) -> NoReturn:
    """What the model says in both before that would be right and wrong at once."""
    problem = f"{chosen.name!r} and {rejected.name!r} part in a {role} message, after the same answer"
    fields.refuse(where, problem, "let them part in the assistant's or remove the row")


def _overlapping(prompt: list[dict], shared: list[dict]) -> list[dict] | None:
    """The prompt of conversations that begin with ``shared``, beside another; None: neither goes on from the other."""
    if prompt in (shared[: len(prompt)], shared[-len(prompt) :]):
        return shared
    if prompt[-len(shared) :] == shared:
        return prompt
    return prompt + shared if prompt[-1]["role"] != "user" and shared[0]["role"] == "user" else None


def shared_messages(chosen: list[dict], rejected: list[dict]) -> int:
    """How many messages both begin with, at least one being left on each side, the first of them an assistant's."""
    count = min(_first_difference(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while count and not chosen[count]["role"] == rejected[count]["role"] == "assistant":
        count -= 1
    return count


def _first_difference(chosen: Sequence, rejected: Sequence) -> int:
    """Where two sequences part; the length of the shorter where it begins the other."""
    both = enumerate(zip(chosen, rejected, strict=False))
    return next((number for number, (one, other) in both if one != other), min(len(chosen), len(rejected)))


def shared_text(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their prompt: up to the last mark, in what both begin with, that hands over
    to the model; or else up to the last space or line end, which goes with the answer, at least one character being
    left on each side."""
    common = _first_difference(chosen, rejected)
    turn = hand_over(chosen, common)
    if turn:
        return turn
    last_space = list(re.finditer(r"\s+", chosen[: min(common + 1, len(chosen), len(rejected))]))
    return last_space[-1].start() if last_space else 0
