"""Dialogues written as one text: where the model's turns begin, where the others' stand, and the text as messages."""

import re
from typing import NamedTuple


class Style(NamedTuple):
    """How a text marks turns: ``others``, each from its mark to the model's next or the end, and ``model``'s."""

    others: re.Pattern
    model: re.Pattern


# HH-RLHF's marks, as (another's, the model's), then those of chat templates: ChatML, Llama 3, Gemma, Zephyr, Llama 2,
# Alpaca.
_MARKS = (
    (r"(?:\A|\n\n)Human:", r"\n\nAssistant:"),
    (r"\n?<\|im_start\|>(?!assistant)", r"<\|im_start\|>assistant\n?"),
    (r"<\|start_header_id\|>(?!assistant)", r"<\|start_header_id\|>assistant<\|end_header_id\|>(?:\n\n)?"),
    (r"\n?<start_of_turn>(?!model)", r"<start_of_turn>model\n?"),
    (r"\n?<\|(?:user|system)\|>", r"<\|assistant\|>\n?"),
    (r"(?:<s>)? ?\[INST\]", r"\[/INST\]"),
    (r"\n{0,2}### (?:Instruction|Human|User|Input):", r"### (?:Response|Assistant):\n?"),
)
STYLES = tuple(
    Style(re.compile(f"({others}).*?({model}|\\Z)", re.DOTALL), re.compile(model)) for others, model in _MARKS
)
HH = STYLES[0]
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Turn(NamedTuple):
    """What others than the model say: its begin, the end of its mark, and its end, the mark of the model's next turn
    with it; ``is_open``: no turn of the model follows."""

    start: int
    mark_end: int
    end: int
    is_open: bool


def hand_over(text: str, end: int | None = None) -> tuple[int, Style | None]:
    """Where, up to ``end``, the model's last turn begins, and the style of its mark; 0 and None: nowhere."""
    stop = len(text) if end is None else end
    found = [(mark.end(), style) for style in STYLES for mark in style.model.finditer(text, 0, stop)]
    return max(found, key=lambda one: one[0], default=(0, None))


def others_turns(text: str, style: Style) -> list[Turn]:
    """The turns of others than the model, in order."""
    return [Turn(one.start(), one.end(1), one.end(), not one[2]) for one in style.others.finditer(text)]


def is_dialogue(text: str, *, open_end: bool = False) -> bool:
    """Whether it is written as HH-RLHF's texts are, a human's turn first; with ``open_end`` the model's is next."""
    begun = re.match(r"\s*Human:", text) is not None and "\n\nAssistant:" in text
    return begun and (not open_end or text.rstrip().endswith("\n\nAssistant:"))


def as_messages(text: str) -> list[dict]:
    """The turns of a dialogue in HH-RLHF's style; an empty last one of the assistant, as a prompt has it, is left
    out."""
    parts = _SPEAKER.split(text.strip())
    turns = [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
