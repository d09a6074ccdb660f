"""JSON and JSON Lines files to rows that know their line."""

import json
from collections.abc import Iterator

from pipa_openrlhf.errors import UserError

_WHITESPACE = " \t\r\n"


def read_json_rows(path: str) -> Iterator[tuple[str, dict]]:
    """``(where, row)`` of each row: a JSON list of objects, or one object a line, whatever the file is called.

    Raises:
        UserError: the file cannot be read, is empty, or holds something else; names the line.
    """
    text = _read_text(path)
    position = _skip_space(text, 0)
    if position == len(text):
        raise UserError(f"{path}: the file is empty; give one JSON object a line")
    if text[position] == "[" and not path.endswith(".jsonl"):
        items = _list_items(text, position, path)
    else:
        items = _line_items(text, path)
    empty = True
    for line, row in items:
        empty = False
        where = f"{path} line {line}"
        if not isinstance(row, dict):
            raise UserError(f'{where}: a row must be a JSON object, this is {_kind(row)}; write {{"prompt": ...}}')
        yield where, row
    if empty:
        raise UserError(f"{path}: the list has no rows; add some")


def read_json_texts(path: str) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of each row, its JSON not yet decoded: see :func:`decode`.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    empty = True
    if not path.endswith(".jsonl") and _is_list(path):
        text = _read_text(path)
        for line, item in _list_items(text, _skip_space(text, 0), path):
            empty = False
            yield line, json.dumps(item)
        if empty:
            raise UserError(f"{path}: the list has no rows; add some")
        return
    try:
        with open(path, "rb") as file:
            for number, content in enumerate(file, start=1):
                # A byte that is no UTF-8 becomes half a surrogate pair, which `decode` refuses.
                line_text = content.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
                if line_text.strip(_WHITESPACE):
                    empty = False
                    yield number, line_text
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path and its permissions") from error
    if empty:
        raise UserError(f"{path}: the file is empty; give one JSON object a line")


def decode(text: str, where: str) -> dict:
    """A row from its JSON.

    Raises:
        UserError: it is no JSON object.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    row = _decode(text, where)
    if not isinstance(row, dict):
        raise UserError(f'{where}: a row must be a JSON object, this is {_kind(row)}; write {{"prompt": ...}}')
    return row


def _is_list(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path and its permissions") from error


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path and its permissions") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 text; save the file as UTF-8") from error


def _line_items(text: str, path: str) -> Iterator[tuple[int, object]]:
    # str.splitlines would also split at U+2028 and its like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip(_WHITESPACE):
            yield number, _decode(line, f"{path} line {number}")


def _decode(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({_reason(error)}); write one object a line") from error


def _list_items(text: str, position: int, path: str) -> Iterator[tuple[int, object]]:
    """Items of a JSON list, decoded one by one so that each knows the line it starts on."""
    decoder = json.JSONDecoder()
    line, counted_to = 1, 0
    position = _skip_space(text, position + 1)
    first = True
    while text[position : position + 1] != "]":
        if not first:
            position = _skip_comma(text, position, path)
        line += text.count("\n", counted_to, position)
        counted_to = position
        try:
            item, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise UserError(f"{path} line {line}: not valid JSON ({_reason(error)}); correct it") from error
        yield line, item
        first = False
        position = _skip_space(text, position)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise UserError(f"{path} line {line}: text after the end of the list; remove it or write one object a line")


def _skip_comma(text: str, position: int, path: str) -> int:
    if text[position : position + 1] != ",":
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{path} line {line}: not valid JSON (expected ',' or ']' after a row); correct it")
    return _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _reason(error: Exception) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
