"""The prompt of pairs that have none beside them: what both sides begin with."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, to_answer
from pipa_openrlhf.data.layouts.dialogue import HH, STYLES, Style, as_messages, hand_over, is_dialogue, others_turns
from pipa_openrlhf.data.layouts.prompts import add_system

ONE_ANSWER = "let them part in the assistant's or remove the row"


def take_prompt(
    row: dict, given: str | list[dict] | None, chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> tuple[str | list[dict] | None, Answer, Answer]:
    """Prompt, with the row's system text, and answers, from texts or messages that hold both.

    Args:
        given: the row's own prompt, beside whole conversations. Text is in them and adds nothing.
    """
    sides = (chosen, rejected)
    for one in sides:
        text = one.steps[-1].rstrip()
        if one.messages is None and text and hand_over(text)[0] == len(text):
            fields.refuse(
                where, f"{one.name!r} ends where its answer should begin", "give it an answer or remove the row"
            )
    are_texts = all(one.messages is None and len(one.steps) == 1 for one in sides)
    if flags.apply_chat_template and are_texts and all(is_dialogue(one.steps[0]) for one in sides):
        chosen, rejected = (to_answer(as_messages(one.steps[0]), one.name, where) for one in sides)
    if flags.apply_chat_template and chosen.messages is not None and rejected.messages is not None:
        shared, chosen, rejected = _take_messages(chosen, chosen.messages, rejected, rejected.messages, where)
        if isinstance(given, list):
            return _overlapping(given, shared, where), chosen, rejected
        return add_system(row, shared, where), chosen, rejected
    if flags.apply_chat_template or not are_texts:
        return None, chosen, rejected
    count, style = shared_text(chosen.steps[0], rejected.steps[0])
    _refuse_parting_in_others_turn(chosen, rejected, where)
    if not count:
        return None, chosen, rejected
    prompt = chosen.steps[0][:count]
    chosen, rejected = (_rest(one, count, style, where) for one in sides)
    # What a chat template wrote has the system text in it.
    return add_system(row, prompt, where) if style in (None, HH) else prompt, chosen, rejected


def _take_messages(
    chosen: Answer, better: list[dict], rejected: Answer, worse: list[dict], where: str
) -> tuple[list[dict], Answer, Answer]:
    if len(better) == 1:
        fields.refuse(where, f"{chosen.name!r} has no prompt", "start it with the user's message or add 'prompt'")
    count = shared_messages(better, worse)
    if not count:
        problem = f"{rejected.name!r} does not start with the prompt of {chosen.name!r}"
        fields.refuse(where, problem, "make their messages before the answer the same")
    parted = _common(better, worse)
    if count < parted < min(len(better), len(worse)) and "user" in (better[parted]["role"], worse[parted]["role"]):
        fields.refuse(where, f"{chosen.name!r} and {rejected.name!r} part in a user's turn", ONE_ANSWER)
    return better[:count], replace(chosen, messages=better[count:]), replace(rejected, messages=worse[count:])


def _overlapping(prompt: list[dict], shared: list[dict], where: str) -> list[dict]:
    """A prompt, which may begin earlier or end earlier than the conversations do, with all that they share."""
    head = prompt[:1] if prompt[0]["role"] == "system" != shared[0]["role"] else []
    rest = prompt[len(head) :]
    if not rest or rest in (shared[: len(rest)], shared[-len(rest) :]):
        return head + shared
    for count in range(min(len(rest), len(shared)), 0, -1):
        if rest[-count:] == shared[:count]:
            return prompt + shared[count:]
    if rest[-1]["role"] != "assistant" or shared[0]["role"] != "user":
        problem = "the conversations of the two sides do not go on from the prompt's"
        fields.refuse(where, problem, "make their messages before the answer the same, or leave one of them out")
    return prompt + shared


def shared_messages(chosen: list[dict], rejected: list[dict]) -> int:
    """How many messages both begin with, at least one being left on each side, the first of them an assistant's."""
    count = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while count and not chosen[count]["role"] == rejected[count]["role"] == "assistant":
        count -= 1
    return count


def shared_text(chosen: str, rejected: str) -> tuple[int, Style | None]:
    """How many characters of two texts are their prompt, and the style of their turns: up to the last mark of the
    model's turn that both begin with, or else up to the last space or line end, which goes with the answer; at least
    one character is left on each side."""
    common = max(min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1), 0)
    count, style = hand_over(chosen, common)
    if style is not None:
        return count, style
    last_space = list(re.finditer(r"\s+", chosen[: common + 1]))
    return (last_space[-1].start() if last_space else 0), None


def _common(first: Sequence, second: Sequence) -> int:
    """How many items both begin with; halving compares long texts much faster than going from one to the next."""
    shorter = range(1, min(len(first), len(second)) + 1)
    return bisect_left(shorter, True, key=lambda count: first[:count] != second[:count])


def _refuse_parting_in_others_turn(chosen: Answer, rejected: Answer, where: str) -> None:
    """Their answers would be to different questions, and the same before them right and wrong at once."""
    texts = (chosen.steps[0], rejected.steps[0])
    common = _common(*texts)
    # Most texts have none of the marks: searching for the model's first is what makes this quick.
    styles = [(text, style) for text in texts for style in STYLES if style.model.search(text)]
    turns = (turn for text, style in styles for turn in others_turns(text, style))
    if any(turn.mark_end <= common < turn.end and not turn.is_open for turn in turns):
        fields.refuse(where, f"{chosen.name!r} and {rejected.name!r} part in a user's turn", ONE_ANSWER)


def _rest(answer: Answer, count: int, style: Style | None, where: str) -> Answer:
    """The answer after the prompt, in which the others' turns that follow are masked."""
    text = answer.steps[0]
    turns = [turn for turn in others_turns(text, style) if turn.start >= count] if style else []
    if turns and turns[-1].is_open:
        fields.refuse(where, f"{answer.name!r} ends with a user's turn", "end with the assistant's")
    masked = tuple((0, turn.start - count, turn.end - count) for turn in turns)
    return replace(answer, steps=[text[count:]], masked=masked)
