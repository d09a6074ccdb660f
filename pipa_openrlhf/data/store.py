"""Columns of samples in files, written once by one process and memory-mapped by all.

A store is a folder with one file a column and ``about.json``. It is written under another name and renamed when it is
complete, so that a folder of that name is whole; its name says what it was made from, so that it never has to change.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

import numpy as np
from filelock import FileLock, Timeout

from pipa_openrlhf.data.samples import TYPES, Columns, Gathered, is_intact
from pipa_openrlhf.errors import UserError, first_line

log = logging.getLogger(__name__)

# Raised when files of a store mean something else than before.
FORMAT_VERSION = 1
_ABOUT = "about.json"
_LOOKED_AT = 100  # samples that are compared with their digests when a store is opened


class Maps(dict):
    """Column by name; its file is mapped when it is first asked for."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> np.ndarray:
        path = os.path.join(self.folder, name)
        # An empty file cannot be mapped.
        empty = not os.path.getsize(path)
        self[name] = np.zeros(0, TYPES[name]) if empty else np.asarray(np.memmap(path, TYPES[name], mode="r"))
        return self[name]

    def __reduce__(self):
        return Maps, (self.folder,)  # another process maps the files itself


def open_or_build(cache_dir: str, key: str, build: Callable[[Gathered], dict]) -> tuple[Columns, dict]:
    """The store of that key, and what is known about it; built where there is none. One process builds, others wait.

    Args:
        build: adds samples to what it is given, and returns what is to be known about them, JSON-ready.

    Raises:
        UserError: the folder cannot be written to.
    """
    root = os.path.join(os.path.expanduser(cache_dir), f"v{FORMAT_VERSION}")
    path = os.path.join(root, key)
    if (found := _open(path)) is not None:
        return found
    lock = FileLock(f"{path}.lock")
    with _reported(root):
        os.makedirs(root, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info(f"Another process prepares these data: waiting for {path}")
            lock.acquire()
    try:
        if (found := _open(path, log.info)) is None:
            _build(root, key, build)
            found = _open(path)
    finally:
        lock.release()
    if found is None:
        raise UserError(f"{path} is damaged right after it was written: give another --data.cache_dir")
    return found


def _build(root: str, key: str, build: Callable[[Gathered], dict]) -> None:
    for name in os.listdir(root):
        # Whoever wrote them is gone: only the holder of the lock writes.
        if name == key or name.startswith(f"{key}.unfinished-"):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    unfinished = os.path.join(root, f"{key}.unfinished-{uuid.uuid4().hex}")
    try:
        with _Files(unfinished) as files:
            files.finish(build(files))
        with _reported(root):
            _rename(unfinished, os.path.join(root, key))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _rename(unfinished: str, path: str) -> None:
    try:
        os.rename(unfinished, path)
    except OSError:
        # Another node's may be there, which a file server did not show at first; of one key all are the same.
        if not os.path.isdir(path):
            raise


class _Files(Gathered):
    """Appends to the files of a new folder."""

    def __init__(self, folder: str):
        super().__init__()
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "_Files":
        with _reported(self._folder):
            os.mkdir(self._folder)
            for name in TYPES:
                self._files[name] = self._stack.enter_context(open(os.path.join(self._folder, name), "wb"))
        return self

    def __exit__(self, *_details) -> None:
        with suppress(OSError):  # what cannot be written was reported before
            self._stack.close()

    def append(self, name: str, array: np.ndarray) -> None:
        with _reported(self._folder):
            self._files[name].write(np.ascontiguousarray(array, dtype=TYPES[name]).tobytes())

    def finish(self, about: dict) -> None:
        """Everything is on the disk after this."""
        self.close()
        with _reported(self._folder), open(os.path.join(self._folder, _ABOUT), "wb") as file:
            sizes = {name: column.tell() for name, column in self._files.items()}
            file.write(json.dumps({"sizes": sizes, **about}).encode())
            for one in (*self._files.values(), file):
                one.flush()
                os.fsync(one.fileno())


def _open(path: str, report: Callable[[str], None] = lambda line: None) -> tuple[Columns, dict] | None:
    """A store, or None where there is none that is whole."""
    try:
        with open(os.path.join(path, _ABOUT), encoding="utf-8") as file:
            about = json.load(file)
        if {name: os.path.getsize(os.path.join(path, name)) for name in TYPES} != about["sizes"]:
            raise ValueError("a file has another size")
        columns = Columns(Maps(path))
        digests = columns.column("digest")
        for index in np.unique(np.linspace(0, len(columns) - 1, _LOOKED_AT, dtype=np.int64)) if len(columns) else ():
            if not is_intact(columns[int(index)], bytes(digests[index])):
                raise ValueError(f"sample {index} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if os.path.isdir(path):
            report(f"{path} is damaged ({first_line(error)}): its data are prepared again")
        return None
    return columns, about


@contextmanager
def _reported(folder: str) -> Iterator[None]:
    """What goes wrong within, while files are written, in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"--data.cache_dir: prepared data cannot be written to {folder} ({reason}): make room there, or give "
            "another folder"
        ) from error
