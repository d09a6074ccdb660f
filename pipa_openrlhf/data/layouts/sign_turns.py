"""Conversations in which the user shows an answer and the assistant says + or -, as RLHFlow trains reward models."""

from typing import TypeGuard

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import labelled_record, split_question
from pipa_openrlhf.data.record import Record

COLUMNS = ("conversations",)
READING = (
    'one answer a conversation: question and first step ("Step 1") are the first turn, each reply is + or -; a '
    "single turn with several steps is one answer with one label"
)
EXAMPLE = {
    "conversations": [
        {"role": "user", "content": "1+1+1= Step 1: 1+1=2"},
        {"role": "assistant", "content": "+"},
        {"role": "user", "content": "Step 2: 2+1=4"},
        {"role": "assistant", "content": "-"},
    ]
}
NAMES = ("conversations", "messages", "conversation")
SIGNS = ("+", "-")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether every second message of a conversation is a sign."""
    return any(_is_rated(row.get(name)) for name in NAMES)


def _is_rated(value: object) -> TypeGuard[list]:
    if not fields.is_messages(value) or not isinstance(value, list):
        return False
    replies = value[1::2]
    return bool(replies) and all(_content(reply) in SIGNS for reply in replies)


def _content(message: object) -> object:
    content = message.get("content", message.get("value")) if isinstance(message, dict) else None
    return content.strip() if isinstance(content, str) else content


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """One record."""
    name = next((name for name in NAMES if _is_rated(row.get(name))), NAMES[0])
    value = fields.column(row, name, where)
    if not _is_rated(value):
        fields.refuse(where, f"{name!r} has turns without a label", "answer every user message by + or -")
    turns = fields.messages(value, name, where)
    for number, message in enumerate(turns):
        role = ("user", "assistant")[number % 2]
        if message["role"] != role:
            fields.refuse(where, f"'{name}[{number}]' is a {message['role']} message", f"the {role}'s is expected")
    if len(turns) % 2:
        fields.refuse(where, f"{name!r} ends with a user message", "answer it by + or -")
    question, first = split_question(turns[0]["content"], name, where)
    steps = [first, *(message["content"] for message in turns[2::2])]
    labels: list[int | None] = [int(message["content"].strip() == "+") for message in turns[1::2]]
    whole = len(steps) == 1 and "Step 2" in first
    rated = None if whole else labels
    return [
        labelled_record(
            row, where, flags, steps, rated, name=name, answer_label=labels[-1], given=whole, prompt=question
        )
    ]
