"""What every entry point does around its own work: parse, run, and end in one readable line."""

import contextlib
import glob
import hashlib
import io
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.errors import UserError


def run(main: Callable[[Any], int | None], module: str | type, argv: list[str] | None = None) -> int:
    """Exit status of ``main(config)``: 0, 1 after a mistake of the user's, 130 after ctrl-C.

    Errors nobody foresaw keep their traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data may hold what the terminal's encoding, or any encoding, has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        show_log(rank)
        return main(parse(module, argv)) or 0
    except UserError as error:
        message, status = f"error: {error}", 1
    except OSError as error:
        # A full disk, a folder that cannot be written: the system's own words and the path say it best.
        where = f": {error.filename}" if error.filename else ""
        message, status = f"error: {error.strerror or error}{where}", 1
    except SafetensorError as error:
        # A full disk again, met by the library that writes weights.
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:
        message, status = ("interrupted" if rank == 0 else ""), 130
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_RANK):
            raise
        show_error("stopped because another rank did")
        time.sleep(_PATIENCE)  # for a launcher to see that one first, and to end this one too
        return 1
    if message:
        show_error(message)
    return status


# What gloo and NCCL say where a rank has gone.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# Ranks of one run meet the same mistake within this many seconds.
_SECONDS = 60
# Seconds to wait for the line of another one.
_PATIENCE = 3


def show_error(message: str) -> None:
    """Print ``message`` on stderr; with several ranks, once a host, and with the rank and host that met it.

    A mistake of one rank only, such as a file that one node lacks, is shown like any other.
    """
    line, mark = message, None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # On a line of its own: the progress bar of another rank may stand on the current one.
        line = f"\n{message} (rank {os.environ.get('RANK')} on {socket.gethostname()})"
        mark = _mark_of(message)
        if not _is_first(mark) and _is_shown(mark):
            return
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    if mark is not None:
        with contextlib.suppress(OSError), open(mark, "w") as file:
            file.write("shown")


def _mark_of(message: str) -> str:
    """A file that stands for the line: ranks that failed cannot talk to each other any more, or not yet."""
    prefix = os.path.join(tempfile.gettempdir(), "pipa_openrlhf_error_")
    for stale in glob.glob(glob.escape(prefix) + "*"):
        _remove_if_old(stale)
    run = (os.getppid(), os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    return prefix + hashlib.sha256(f"{run} {message}".encode()).hexdigest()[:32]


def _is_first(mark: str) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _is_shown(mark: str) -> bool:
    """Whether the rank that was first showed the line: a launcher kills the others as soon as one has ended."""
    end = time.time() + _PATIENCE
    while time.time() < end:
        with contextlib.suppress(OSError):
            if os.stat(mark).st_size:
                return True
        time.sleep(0.05)
    return False


def _remove_if_old(path: str) -> None:
    try:
        if time.time() - os.stat(path).st_mtime > _SECONDS:
            os.remove(path)
    except OSError:
        pass  # another rank was faster, or it is another user's


class _Printed(logging.Handler):
    """Log records as plain lines on standard output, wherever that leads when they are made."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def show_log(rank: int) -> None:
    """Print what the package logs, on the first rank only."""
    logger = logging.getLogger("pipa_openrlhf")
    if not any(isinstance(handler, _Printed) for handler in logger.handlers):
        logger.addHandler(_Printed())
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
