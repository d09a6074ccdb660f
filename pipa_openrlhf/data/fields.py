"""Checks of single values of a row. Each refusal says where, what, and what to do."""

import math
from typing import Any, NoReturn, TypeGuard

from pipa_openrlhf.errors import UserError

# A CSV file has no other way to write a label.
_CELL_LABELS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
_NAMES = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Cell(str):
    """A text from a CSV file; a label may be written so, in other files a label is no text."""


def refuse(where: str, problem: str, remedy: str) -> NoReturn:
    """Raise the one-line error about a row."""
    raise UserError(f"{where}: {problem}; {remedy}")


def show(value: object) -> str:
    """A value in a message: its beginning, on one line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def column(row: dict, name: str, where: str) -> object:
    """The value of a column that must be there and not be null."""
    if name not in row:
        refuse(
            where, f"no column {name!r} (columns: {', '.join(map(str, row)) or 'none'})", f"add {name!r} to the row"
        )
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
    """true/false, 1/0 or 1.0/0.0; in CSV the same as text."""
    if isinstance(value, Cell):
        value = _CELL_LABELS.get(value.strip().lower(), value)
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        refuse(where, f"{name!r} is {show(value)}", "a label is true/false or 1/0")
    return int(value)


def labels(value: object, name: str, num_steps: int, where: str) -> list[int]:
    """One label a step."""
    if not isinstance(value, list):
        refuse(where, f"{name!r} is {show(value)}", "give a list with one label (1/0) a step")
    if len(value) != num_steps:
        refuse(where, f"{len(value)} {name!r} for {num_steps} steps", "give one label a step")
    return [label(item, f"{name}[{index}]", where) for index, item in enumerate(value)]


def steps(value: list, name: str, where: str) -> list[str]:
    """A list of step texts, none of them empty."""
    if not value:
        refuse(where, f"{name!r} has no steps", "give at least one or remove the row")
    return [text(item, f"{name}[{index}]", where) for index, item in enumerate(value)]


def is_messages(value: object) -> TypeGuard[list]:
    """True for a list that starts like chat messages (an empty list is no conversation)."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def messages(value: list, name: str, where: str) -> list[dict]:
    """Chat messages with role and content; keys that are null are left out at any depth, as Parquet adds them.

    The content of a message with tool calls may be null, and stays so.
    """
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(message, dict):
            refuse(where, f"{place!r} is {show(message)}", "a message is an object with 'role' and 'content'")
        text(column(message, "role", f"{where}: {place}"), f"{place}.role", where)
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            refuse(
                where, f"'{place}.tool_calls' is {show(calls)}", "give a list of calls, each with a function's name"
            )
        if message.get("content") is not None or not calls:
            text(column(message, "content", f"{where}: {place}"), f"{place}.content", where, may_be_empty=True)
    return [{**_without_nulls(message), "content": message.get("content")} for message in value]


def _is_call(value: object) -> bool:
    function = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def q_value(value: object, name: str, where: str) -> float:
    """A number in [-1, 1]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or not -1 <= value <= 1:
        refuse(where, f"{name!r} is {show(value)}", "Q is a number from -1 to 1")
    return float(value)
