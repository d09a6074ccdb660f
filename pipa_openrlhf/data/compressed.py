"""Bytes of a file as they were before compression, which the end of its name tells: ``.gz``, ``.zst`` or another."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

from pipa_openrlhf.errors import UserError, first_line

COMPRESSED = (".gz", ".zst")

_BUFFER = 1 << 18
_ZST_PIECE = 1 << 14  # compressed bytes at once: small, because what comes out may be many times as much


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """The file to read, decompressed on the way.

    Raises:
        UserError: it cannot be opened, or what is read within the ``with`` block is damaged or cut off.
    """
    try:
        with _opened(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the compressed file is damaged or cut off ({first_line(error).rstrip('.')})"
        raise UserError(f"{path}: {problem}; copy it again, or compress the data again") from error
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or first_line(error)}; check the path and its permissions"
        ) from error


def _opened(path: str) -> IO[bytes]:
    name = path.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path), _BUFFER)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstFile(open(path, "rb")), _BUFFER)
    return open(path, "rb", buffering=_BUFFER)


class _ZstFile(io.RawIOBase):
    """Frames of Zstandard one after another. The package's own reader takes a file that is cut off for a whole one.

    Raises:
        EOFError: the file is damaged or cut off.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame: Any = None  # the frame that is begun and not ended
        self._compressed = b""
        self._bytes = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, target) -> int:
        while not self._bytes:
            self._compressed = self._compressed or self._file.read(_ZST_PIECE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._decompress()
        count = min(len(target), len(self._bytes))
        target[:count] = self._bytes[:count]
        self._bytes = self._bytes[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            self._bytes = memoryview(self._frame.decompress(self._compressed))
        except zstandard.ZstdError as error:
            raise EOFError(first_line(error)) from error
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
