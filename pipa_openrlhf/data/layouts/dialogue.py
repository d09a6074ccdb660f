"""Dialogues written as one text: where the model's turns begin, what others say between them, and the messages."""

import re
from typing import NamedTuple


class Style(NamedTuple):
    """How a text marks its turns: HH-RLHF's marks, and those of chat templates that data were rendered by."""

    others: re.Pattern[str]  # opens a turn of somebody else
    model: re.Pattern[str]  # hands over to the model


STYLES = tuple(
    Style(re.compile(others), re.compile(model))
    for others, model in (
        (r"\n\nHuman:", r"\n\nAssistant:"),
        (r"<\|im_start\|>(?!assistant)", r"<\|im_start\|>assistant\n"),
        (
            r"<\|start_header_id\|>(?!assistant)",
            r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        ),
        (r"<start_of_turn>(?!model)", r"<start_of_turn>model\n"),
        (r"<\|(?:user|system)\|>", r"<\|assistant\|>\n?"),
        (r"<extra_id_1>User", r"<extra_id_1>Assistant\n"),
        (r"\[INST\]", r"\[/INST\]"),
        (r"<｜User｜>", r"<｜Assistant｜>"),
        (r"### (?:Instruction|Human|User):", r"### (?:Response|Assistant):\n?"),
    )
)
_HAND_OVER = re.compile("|".join(style.model.pattern for style in STYLES))
_LONGEST_MARK = 64  # characters, with the space after it
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_TURNS = re.compile(r"(?:^|\n\n)Human:.*\n\nAssistant:", re.DOTALL)


def hand_over(text: str, end: int) -> int:
    """Where, up to ``end``, the last turn of the model begins; 0: nowhere."""
    return max((found.end() for found in _HAND_OVER.finditer(text, 0, end)), default=0)


def style_of(prompt: str) -> Style | None:
    """The style of a prompt that ends where the model's turn begins."""
    tail = prompt[-_LONGEST_MARK:]
    if _HAND_OVER.search(tail) is None:
        return None
    ending = (style for style in STYLES if any(not tail[one.end() :].strip() for one in style.model.finditer(tail)))
    return next(ending, None)


def turns_of_others(answer: str, style: Style) -> list[tuple[int, int]]:
    """Characters of an answer that others wrote, with the marks around them."""
    spans, end = [], 0
    while (opened := style.others.search(answer, end)) is not None:
        closed = style.model.search(answer, opened.end())
        end = closed.end() if closed else len(answer)
        spans.append((opened.start(), end))
    return spans


def is_dialogue(text: str, *, open_end: bool = False) -> bool:
    """Whether it has turns as HH-RLHF's texts do; with ``open_end`` the model's is next."""
    text = text.strip()
    return _TURNS.search(text) is not None and (not open_end or text.endswith("\n\nAssistant:"))


def as_messages(text: str) -> list[dict]:
    """The turns of an HH-RLHF text, one that begins without a speaker with the assistant's; a last turn of the
    assistant that is empty, as a prompt has, is left out."""
    first, *parts = _SPEAKER.split(text.strip())
    messages = [{"role": "assistant", "content": first.strip()}] if first else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
