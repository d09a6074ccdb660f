"""Checks of single values of a row. Each refusal says where, what, and what to do."""

import math
from collections.abc import Iterable
from typing import Any, NoReturn, TypeGuard

from pipa_openrlhf.errors import UserError

# A label, in lower case. The signs are Math-Shepherd's, the words those of public data.
_RIGHT = ("true", "1", "1.0", "+", "positive", "correct", "right", "good", "yes", "chosen", "desirable")
_WRONG = (
    *("false", "0", "0.0", "-1", "-1.0", "-", "negative", "incorrect", "wrong", "bad", "no"),
    *("rejected", "undesirable"),
)
_TEXT_LABELS = {**dict.fromkeys(_RIGHT, 1), **dict.fromkeys(_WRONG, 0)}
# What makes messages: OpenAI's keys, and ShareGPT's with their names of the roles.
_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"observation": "tool"},
}
_NAMES = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def refuse(where: str, problem: str, remedy: str) -> NoReturn:
    """Raise the one-line error about a row."""
    raise UserError(f"{where}: {problem}; {remedy}")


def show(value: object) -> str:
    """A value in a message: its beginning, on one line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def column_names(names: Iterable[object]) -> str:
    """Names of columns in a message: what cannot be printed, or not on one line, is escaped."""
    return ", ".join(name if name.isprintable() else repr(name)[1:-1] for name in map(str, names)) or "none"


def column(row: dict, name: str, where: str) -> object:
    """The value of a column that must be there and not be null."""
    if name not in row:
        refuse(where, f"no column {name!r} (columns: {column_names(row)})", f"add {name!r} to the row")
    if row[name] is None:
        refuse(where, f"{name!r} is null", "give it a value or remove the row")
    return row[name]


def text(value: object, name: str, where: str, *, may_be_empty: bool = False) -> str:
    """A string that a tokenizer can read."""
    if not isinstance(value, str):
        kind = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
        refuse(where, f"{name!r} must be text, it is {kind}", "put a string there or remove the row")
    if not value and not may_be_empty:
        refuse(where, f"{name!r} is empty", "give it text or remove the row")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(where, f"{name!r} holds half of a surrogate pair, which is no character", "repair the text")
    return str(value)


def label(value: object, name: str, where: str) -> int:
    """1 for true, 1, 1.0, "true", "+" and the like, 0 for false, 0, -1, "false", "-" and the like."""
    if isinstance(value, str) and value.strip().lower() in _TEXT_LABELS:
        return _TEXT_LABELS[value.strip().lower()]
    if not isinstance(value, (bool, int, float)) or value not in (-1, 0, 1):
        refuse(where, f"{name!r} is {show(value)}", 'a label is true/false, 1/0 (or -1), or "+"/"-"')
    return int(value == 1)


def is_label(value: object) -> bool:
    """Whether :func:`label` reads it."""
    if isinstance(value, str):
        return value.strip().lower() in _TEXT_LABELS
    return isinstance(value, (bool, int, float)) and value in (-1, 0, 1)


def number(value: object) -> float | None:
    """A finite number or its text; None for anything else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def score(value: object, name: str, where: str, threshold: float) -> int:
    """A label, or a number (in a CSV file, its text): 1 from ``threshold`` on."""
    found = number(value) if isinstance(value, (float, str)) else None
    if found is not None and found not in (-1, 0, 1):
        return int(found >= threshold)
    return label(value, name, where)


def labels(
    value: object, name: str, num_steps: int, where: str, threshold: float = 0.5, neutral: str = "mask"
) -> list[int | None]:
    """One label a step.

    Args:
        threshold: labels that are numbers between are 1 from there on.
        neutral: what 0 is beside a -1: ``positive``, ``negative`` or ``mask`` (None).
    """
    if not isinstance(value, list):
        refuse(where, f"{name!r} is {show(value)}", "give a list with one label (1/0) a step")
    if len(value) != num_steps:
        refuse(where, f"{len(value)} {name!r} for {num_steps} steps", "give one label a step")
    numbers = [number(item) for item in value]
    scores = any(item is not None and item not in (-1, 0, 1) for item in numbers)
    signed = -1 in numbers and not scores
    return [
        NEUTRAL[neutral]
        if signed and found == 0
        else int(found >= threshold)
        if scores and found is not None
        else label(item, f"{name}[{index}]", where)
        for index, (item, found) in enumerate(zip(value, numbers))
    ]


# By the value of --data.neutral_step.
NEUTRAL: dict[str, int | None] = {"positive": 1, "negative": 0, "mask": None}


def weight(row: dict, where: str) -> float:
    """The row's ``weight``, 1.0 where there is none."""
    value = row.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        refuse(where, f"'weight' is {show(value)}", "give a number from 0 on")
    return float(value)


def optional_text(row: dict, name: str, where: str) -> str:
    """A column's text; "" where it is missing or null."""
    value = row.get(name)
    return "" if value is None else text(value, name, where, may_be_empty=True)


def steps(value: list, name: str, where: str) -> list[str]:
    """A list of step texts, none of them empty."""
    if not value:
        refuse(where, f"{name!r} has no steps", "give at least one or remove the row")
    return [text(item, f"{name}[{index}]", where) for index, item in enumerate(value)]


def is_messages(value: object) -> TypeGuard[list | dict]:
    """True for a message, and for a list that starts like messages (an empty list is no conversation)."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and (isinstance(value, list) or _is_message(first))


def _is_message(value: dict) -> bool:
    return ("role" in value and "content" in value) or ("from" in value and "value" in value)


def messages(value: list | dict, name: str, where: str) -> list[dict]:
    """Chat messages with role and content, from a list or a single one, with OpenAI's keys or ShareGPT's.

    Content in text parts is joined. Keys that are null are left out at any depth, as Parquet adds them. The content of
    a message with tool calls may be null, and stays so.
    """
    found = []
    for index, message in enumerate(value if isinstance(value, list) else [value]):
        place = f"{name}[{index}]"
        if not isinstance(message, dict):
            refuse(where, f"{place!r} is {show(message)}", "a message is an object with 'role' and 'content'")
        found.append(_message(message, place, where))
    return found


def _message(message: dict, place: str, where: str) -> dict:
    if "from" in message and "value" in message and "role" not in message:
        others = {key: item for key, item in message.items() if key not in ("from", "value")}
        role = _ROLES.get(message["from"], message["from"])
        message = {"role": role, "content": message["value"], **others}
    text(column(message, "role", f"{where}: {place}"), f"{place}.role", where)
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        refuse(where, f"'{place}.tool_calls' is {show(calls)}", "give a list of calls, each with a function's name")
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, place, where)
    elif content is not None or not calls:
        text(column(message, "content", f"{where}: {place}"), f"{place}.content", where, may_be_empty=True)
    return {**_without_nulls(message), "content": content}


def _join_parts(parts: list, place: str, where: str) -> str:
    texts = []
    for number, part in enumerate(parts):
        part_place = f"{place}.content[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            refuse(where, f"{part_place!r} is {show(part)}", 'only text parts are read, {"type": "text", "text": ...}')
        texts.append(text(part["text"], part_place, where, may_be_empty=True))
    return "".join(texts)


def _is_call(value: object) -> bool:
    function = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def q_value(value: object, name: str, where: str) -> float:
    """A number in [-1, 1], or its text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or not -1 <= value <= 1:
        refuse(where, f"{name!r} is {show(value)}", "Q is a number from -1 to 1")
    return float(value)
