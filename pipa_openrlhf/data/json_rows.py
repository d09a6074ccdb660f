"""JSON and JSON Lines files to rows that know their line; a row is in memory, never the file.

A long text is cut into values by a scanner that sees where each begins and ends without decoding it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from pipa_openrlhf.data.compressed import COMPRESSED, open_bytes
from pipa_openrlhf.errors import UserError, first_line

_WHITESPACE = b" \t\r\n"
# A file that is one object with these keys alone holds a list of rows for each; any other object is a row.
_SPLITS = ("train", "test", "validation", "valid", "val", "eval", "dev")
_ONLY_LIST = "data"
_EXCERPT = 20  # characters of a row that a message shows

Texts = Iterator[tuple[int, str]]

_SCANNED = 1 << 18  # bytes

_SPACE = re.compile(r"[ \t\r\n]*")
# A string without escapes at once; a quote alone begins any other string.
_TOKEN = re.compile(r'"[^"\\]*"|["{}\[\]]')
_SCALAR_END = re.compile(r'[ \t\r\n,:"{}\[\]]')


def is_json_path(path: str) -> bool:
    """Whether the name is that of a JSON or JSON Lines file, compressed or not."""
    return _plain_name(path).endswith((".json", ".jsonl"))


def read_json_rows(path: str, split: str = "train") -> Iterator[tuple[str, dict]]:
    """``(where, row)`` of each row, as ``read_json_texts`` finds them.

    Raises:
        UserError: as ``read_json_texts``, or a row is no JSON object; names the line.
    """
    for line, text in read_json_texts(path, split):
        where = f"{path} line {line}"
        yield where, decode(text, where)


def read_json_texts(path: str, split: str = "train") -> Texts:
    """``(line, text)`` of each row: the line it starts on, and its JSON, not decoded.

    The file is one of these, whatever its layout and compression:

    - an object a line;
    - objects one after another, the first of which spans several lines;
    - a list of objects, where the file is not called ``.jsonl``;
    - one object with a list of objects for each split, where the file is not called ``.jsonl``: the rows of ``split``,
      or of the only one there is. Or such an object with the only key ``data``.

    Raises:
        UserError: the file cannot be read, is empty, has no such split, or is no such file; names the line.
    """
    texts = _texts(path, split)
    first = next(texts, None)
    if first is None:
        raise UserError(f"{path}: the list has no rows; add some")
    yield first
    yield from texts


def decode(text: str, where: str) -> dict:
    """The row of a text of ``read_json_texts``.

    Args:
        where: the file and the line that the row starts on: ``<path> line <number>``.

    Raises:
        UserError: not UTF-8, not valid JSON (names the line of the defect, and the column in the row's text), or no
            object.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = _further(where, text.count("\n", 0, error.start))
            raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply); correct it") from error
    except json.JSONDecodeError as error:
        where = _further(where, error.lineno - 1)
        remedy = "write one object a line" if error.msg == "Extra data" else "correct it"
        raise UserError(f"{where}: not valid JSON ({_reason(error)}); {remedy}") from error
    except ValueError as error:  # a number of more digits than Python takes
        raise UserError(f"{where}: not valid JSON ({first_line(error)}); correct it") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a row must be a JSON object, this is {_kind(row)}; write {{"prompt": ...}}')
    return row


def _further(where: str, lines: int) -> str:
    return re.sub(r"\d+$", lambda line: str(int(line[0]) + lines), where)


def _texts(path: str, split: str) -> Texts:
    with open_bytes(path) as file:
        first = _Scanner(file).peek()
    if not first:
        raise UserError(f"{path}: the file is empty; give one JSON object a line")
    is_document = not _plain_name(path).endswith(".jsonl")
    if is_document and first == "[":
        return _list_texts(path)
    if is_document and first == "{" and (splits := _split_names(path, split)):
        return _split_texts(path, splits, split)
    if _starts_over_several_lines(path):
        return _object_texts(path)
    return _line_texts(path)


def _line_texts(path: str) -> Texts:
    with open_bytes(path) as file:
        # Lines end at b"\n": for str.splitlines they would also end at U+2028 and its like, which strings may hold.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.rstrip(_WHITESPACE)
            if line:
                # Here and in the scanner, a byte that is no UTF-8 becomes half a surrogate pair: `decode` refuses it.
                yield number, line.decode(errors="surrogateescape")


def _object_texts(path: str) -> Texts:
    with open_bytes(path) as file:
        scanner = _Scanner(file)
        while scanner.peek():
            yield _row(scanner, path)


def _list_texts(path: str) -> Texts:
    with open_bytes(path) as file:
        scanner = _Scanner(file)
        scanner.take("[")
        if not scanner.take("]"):
            yield _row(scanner, path)
            while not scanner.take("]"):
                if not scanner.take(","):
                    problem = "not valid JSON (expected ',' or ']' after a row); correct it"
                    raise UserError(f"{path} line {scanner.line}: {problem}")
                yield _row(scanner, path)
        if scanner.peek():
            problem = "text after the end of the list; remove it or write one object a line"
            raise UserError(f"{path} line {scanner.line}: {problem}")


def _row(scanner: "_Scanner", path: str) -> tuple[int, str]:
    """The next value. Raises UserError where it cannot be a row; whether it is one is known when it is decoded."""
    scanner.peek()
    line = scanner.line
    text, ended = scanner.value()
    if not ended or not text.startswith("{"):
        decode(text, f"{path} line {line}")  # only for what it raises
    return line, text


def _split_names(path: str, wanted: str) -> list[str]:
    """The splits of a file that is one object of lists of objects; none where it is anything else."""
    names: list[str] = []
    with open_bytes(path) as file:
        try:
            for name, _, text in _walk_splits(_Scanner(file)):
                if not text:
                    _expect(name in (*_SPLITS, _ONLY_LIST, wanted) and name not in names)
                    names.append(name)
            _expect(_ONLY_LIST not in names or names == [_ONLY_LIST] or wanted == _ONLY_LIST)
        except _NotSplits:
            return []
    return names


def _split_texts(path: str, names: list[str], wanted: str) -> Texts:
    if wanted not in names:
        if len(names) > 1:
            problem = f"no split {wanted!r}, it has {', '.join(names)}"
            raise UserError(f"{path}: {problem}; choose one by --data.dataset_split")
        wanted = names[0]
    with open_bytes(path) as file:
        for name, line, text in _walk_splits(_Scanner(file)):
            if text and name == wanted:
                yield line, text


class _NotSplits(Exception):
    pass


def _walk_splits(scanner: "_Scanner") -> Iterator[tuple[str, int, str]]:
    """``(name, line, text)``: once without text where the list of a split begins, then for each of its rows."""
    scanner.take("{")
    while True:
        if scanner.peek() != '"':
            raise _NotSplits
        key, _ = scanner.value()
        _expect(scanner.take(":") and scanner.take("["))
        name = key[1:-1]
        yield name, scanner.line, ""
        if not scanner.take("]"):
            while True:
                _expect(scanner.peek() == "{")
                line = scanner.line
                text, ended = scanner.value()
                _expect(ended)
                yield name, line, text
                if scanner.take("]"):
                    break
                _expect(scanner.take(","))
        if scanner.take("}"):
            break
        _expect(scanner.take(","))
    _expect(not scanner.peek())


def _expect(fits: bool) -> None:
    if not fits:
        raise _NotSplits


def _starts_over_several_lines(path: str) -> bool:
    """Whether the first line that is not blank begins an object, rather than being one or being broken."""
    with open_bytes(path) as file:
        lines = (line.decode(errors="replace") for line in file if line.strip(_WHITESPACE + codecs.BOM_UTF8))
        first = next(lines, "").lstrip("\ufeff").strip()
        if not first.startswith("{") or not _leaves_open(first):
            return False
        # A row that was cut off has the next row under it, and that is no way to go on except for a list's first item
        # or a key's value.
        return first.endswith(("[", ":")) or not _is_object(next(lines, ""))


def _leaves_open(line: str) -> bool:
    end = _ContainerEnd()
    _, ended = end.find(line, 0)
    return not ended and not end.quoted


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _plain_name(path: str) -> str:
    """The name in small letters, without the end that says how it is compressed."""
    name = path.lower()
    return name[: name.rindex(".")] if name.endswith(COMPRESSED) else name


def _reason(error: json.JSONDecodeError) -> str:
    excerpt = error.doc[error.pos : error.pos + _EXCERPT]
    return f"{error.msg}, column {error.colno}" + (f", at {excerpt!r}" if excerpt else "")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


class _Scanner:
    """Goes through the text of a file and keeps no more of it than a chunk and the value it is at.

    Whether a value is valid JSON is not looked at: where it ends is right if it is valid, and if it is not, then the
    text that is returned has the first defect in it.

    Args:
        file: UTF-8, with or without a byte order mark; any other byte becomes half a surrogate pair.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at = "", 0  # what was read and is not dropped yet; what comes next in it
        self._line, self._counted = 1, 0  # the line of `_text[_counted]`

    @property
    def line(self) -> int:
        """The line of what comes next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """The next character that is no space, which comes next from now on; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # it matches the empty text
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, character: str) -> bool:
        """Passes the next character that is no space if it is this one."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> tuple[str, bool]:
        """Passes the next value; its text from its first character on, and whether the file goes on to its end."""
        if self.peek() in ("{", "[", '"'):
            end = _ContainerEnd()
            length, ended = 0, False
            while not ended:
                position, ended = end.find(self._text, self._at + length)
                length = position - self._at
                if not ended and not self._read_more():
                    break
        else:
            length, ended = self._scalar_length(), True
        text = self._text[self._at : self._at + length]
        self._at += length
        return text, ended

    def _scalar_length(self) -> int:
        length = 1  # at least: a character that begins no value is passed too
        while not (match := _SCALAR_END.search(self._text, self._at + length)):
            length = max(1, len(self._text) - self._at)
            if not self._read_more():
                return len(self._text) - self._at
        return match.start() - self._at

    def _read_more(self) -> bool:
        """Appends a chunk and drops what was passed; whether there was one."""
        rest = len(self._text) - self._at
        # In proportion to a long value, since all of it is copied each time.
        data = self._file.read(max(_SCANNED, rest // 8))
        chunk = self._decoder.decode(data, not data)
        self._line, self._counted = self.line, 0
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(data)


class _ContainerEnd:
    """Looks for the end of an object, list or string in a text that grows; nothing is looked at twice.

    Attributes:
        quoted: whether it got to the middle of a string.
    """

    def __init__(self) -> None:
        self._depth = 0
        self.quoted = False

    def find(self, text: str, position: int) -> tuple[int, bool]:
        """The end and True, or how far it got and False: then it goes on there once the text is longer."""
        while True:
            if self.quoted:
                position, ended = _string_end(text, position)
                if not ended:
                    return position, False
                self.quoted = False
            else:
                match = _TOKEN.search(text, position)
                if match is None:
                    return len(text), False
                position = match.end()
                token = match[0]
                if token in "{[":
                    self._depth += 1
                elif token in "}]":
                    self._depth -= 1
                else:
                    self.quoted = token == '"'
            if not self._depth and not self.quoted:
                return position, True


def _string_end(text: str, position: int) -> tuple[int, bool]:
    """What is behind the closing quote and True, or the length of the text and False."""
    while True:
        quote = text.find('"', position)
        if quote < 0:
            return len(text), False
        start = quote
        while text[start - 1] == "\\":  # stops at the opening quote at the latest
            start -= 1
        position = quote + 1
        if (quote - start) % 2 == 0:
            return position, True
