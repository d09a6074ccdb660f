"""Where the values of a long JSON text begin and end, without decoding them and without the whole text in memory."""

import codecs
import re
from typing import IO

CHUNK = 1 << 18  # bytes

_SPACE = re.compile(r"[ \t\r\n]*")
# A string without escapes at once; a quote alone begins any other string.
_TOKEN = re.compile(r'"[^"\\]*"|["{}\[\]]')
_SCALAR_END = re.compile(r'[ \t\r\n,:"{}\[\]]')


class JsonScanner:
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
            end = ContainerEnd()
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
        data = self._file.read(max(CHUNK, rest // 8))
        chunk = self._decoder.decode(data, not data)
        self._line, self._counted = self.line, 0
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(data)


class ContainerEnd:
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
