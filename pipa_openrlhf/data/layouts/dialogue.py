"""Dialogues written as one text: where the model's turns begin, and the text as messages."""

import re

# Where a text hands over to the model: HH-RLHF's mark, and those of chat templates that data were rendered by.
_HAND_OVER = re.compile(
    r"\n\nAssistant:|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<start_of_turn>model\n|<\|assistant\|>\n?|\[/INST\]|### (?:Response|Assistant):\n?"
)
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_HUMAN_TURN = re.compile(r"\n\nHuman:.*?(?:\n\nAssistant:|\Z)", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hand_over(text: str, end: int) -> int:
    """Where, up to ``end``, the last turn of the model begins; 0: nowhere."""
    return max((found.end() for found in _HAND_OVER.finditer(text, 0, end)), default=0)


def human_turns(text: str) -> list[tuple[int, int]]:
    """Characters of an answer in HH-RLHF's style that the other side wrote, with the marks around them."""
    return [found.span() for found in _HUMAN_TURN.finditer(text)]


def is_dialogue(text: str, *, open_end: bool = False) -> bool:
    """Whether it is written as HH-RLHF's texts are, a human's turn first; with ``open_end`` the model's is next."""
    begun = re.match(r"\s*Human:", text) is not None and "\n\nAssistant:" in text
    return begun and (not open_end or text.rstrip().endswith("\n\nAssistant:"))


def as_messages(text: str) -> list[dict]:
    """Its turns; a last turn of the assistant that is empty (a prompt has one) is left out."""
    parts = _SPEAKER.split(text.strip())
    messages = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
