"""One line for one mistake, however many ranks make it."""

import glob
import hashlib
import os
import socket
import sys
import tempfile
import time

# Ranks of one run meet the same mistake within this many seconds.
_SECONDS = 60


def show_error(message: str) -> None:
    """Print ``message`` on stderr; with several ranks, once a host, and with the rank and host that met it.

    A mistake of one rank only, such as a file that one node lacks, is shown like any other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not _is_first_on_this_host(message):
            return
        message = f"{message} (rank {os.environ.get('RANK')} on {socket.gethostname()})"
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)


def _is_first_on_this_host(message: str) -> bool:
    # Ranks that failed cannot talk to each other any more, or not yet: an empty file stands for the line.
    prefix = os.path.join(tempfile.gettempdir(), "pipa_openrlhf_error_")
    for stale in glob.glob(glob.escape(prefix) + "*"):
        _remove_if_old(stale)
    run = (os.getppid(), os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    digest = hashlib.sha256(f"{run} {message}".encode()).hexdigest()[:32]
    try:
        os.close(os.open(prefix + digest, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _remove_if_old(path: str) -> None:
    try:
        if time.time() - os.stat(path).st_mtime > _SECONDS:
            os.remove(path)
    except OSError:
        pass  # another rank was faster, or it is another user's
