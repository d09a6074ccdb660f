"""What every layout of pairs shares: two answers to one prompt, made into two records."""

import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.layouts.dialogue import as_messages, hand_over, human_turns, is_dialogue
from pipa_openrlhf.data.layouts.prompts import complete_prompt
from pipa_openrlhf.data.record import FROM_SIDE, Record


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

    Without a prompt, and for whole conversations, it is what both sides begin with: see :func:`shared_text` and
    :func:`shared_messages`.

    Args:
        complete: False: the sides are the next step of an answer that goes on, so that no label of a whole answer is
            known: only which side it is.
    """
    if isinstance(prompt, str) and is_dialogue(prompt, open_end=True):
        chosen, rejected = _without_dialogue(prompt, chosen), _without_dialogue(prompt, rejected)
        prompt = as_messages(prompt) if flags.apply_chat_template else prompt
    without_prompt = prompt is None
    if flags.apply_chat_template and prompt is None:
        chosen, rejected = _from_dialogue(chosen), _from_dialogue(rejected)
    whole = all(one.messages is not None and one.messages[0]["role"] != "assistant" for one in (chosen, rejected))
    if prompt is None or (whole and flags.apply_chat_template):
        prompt, chosen, rejected = _take_prompt(row, prompt, chosen, rejected, flags, where)
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
            masked_spans=_others_turns(answer) if without_prompt else (),
        )
        for side, answer, step_labels in ((1, chosen, chosen_labels), (0, rejected, rejected_labels))
    ]


def _without_dialogue(prompt: str, answer: Answer) -> Answer:
    """The answer alone, where the dialogue before it is written twice."""
    if answer.messages is not None or not answer.steps[0].startswith(prompt) or answer.steps[0] == prompt:
        return answer
    return replace(answer, steps=[answer.steps[0][len(prompt) :], *answer.steps[1:]])


def _from_dialogue(answer: Answer) -> Answer:
    if answer.messages is not None or len(answer.steps) > 1 or not is_dialogue(answer.steps[0]):
        return answer
    messages = as_messages(answer.steps[0])
    return Answer(answer.name, [messages[-1]["content"]], messages)


def _others_turns(answer: Answer) -> tuple[tuple[int, int, int], ...]:
    """What the human says within one side of a dialogue written as text, whose sides part before its last turn."""
    if answer.messages is not None or len(answer.steps) > 1:
        return ()
    return tuple((0, start, end) for start, end in human_turns(answer.steps[0]))


def _take_prompt(
    row: dict, prompt: str | list[dict] | None, chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> tuple[str | list[dict] | None, Answer, Answer]:
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
