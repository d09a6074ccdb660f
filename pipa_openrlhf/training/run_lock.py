"""One run at a time writes to a folder: what a killed launcher left running must not meet the run started after it."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipa_openrlhf.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".run_lock"
# Orphans of a killed launcher finish their step within it, and a file server forgets the locks of a dead node.
PATIENCE = 120.0


@contextmanager
def alone_in(folder: str, flag: str = "--ckpt.output_dir") -> Iterator[None]:
    """Hold the lock of an output folder, after waiting for another run that does. On rank 0, before it looks inside.

    The lock is the system's: it ends with the process, however that ends. Where files cannot be locked, there is none.

    Args:
        flag: that names the folder.

    Raises:
        UserError: the other run is still there after ``PATIENCE`` seconds.
    """
    made = _make_folders(folder)
    path = os.path.join(folder, LOCK)
    descriptor = _wait_for(path, folder, flag)
    try:
        yield
    finally:
        # Deleted while it is held, so that nobody who has it next finds it gone.
        with suppress(FileNotFoundError):
            os.remove(path)
        os.close(descriptor)
        with suppress(OSError):  # nothing is left of a run that was refused
            for one in made:
                os.rmdir(one)


def _make_folders(folder: str) -> list[str]:
    """Make a folder with all above it; returns those that were not there, the deepest first."""
    missing, path = [], os.path.abspath(folder)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return missing


def _wait_for(path: str, folder: str, flag: str) -> int:
    end, has_said = time.monotonic() + PATIENCE, False
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
        except OSError:
            return descriptor
        else:
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                return descriptor
            os.close(descriptor)  # its holder deleted it meanwhile
            continue
        if time.monotonic() > end:
            raise UserError(
                f"{folder} is being written to by a run that is still going ({holder}): wait for its end, end it, or "
                f"give another {flag}"
            )
        if not has_said:
            log.info(f"Waiting for the run that writes to {folder} ({holder})")
            has_said = True
        time.sleep(0.5)


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
