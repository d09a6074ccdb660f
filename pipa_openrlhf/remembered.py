"""What was once found out, remembered: of a large file until it changes, of the hub while this process runs; and where
such things are kept.
"""

import json
import os
from collections.abc import Callable
from functools import cache

_HUB_SECONDS = 5  # it answers well within


def user_cache_dir(name: str) -> str:
    """One folder for all runs of a user, so that what a run prepares the next one finds."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "pipa_openrlhf", name)


def remembered(name: str, stamp: list, memory_path: str, compute: Callable[[], str]) -> str:
    """``compute()``, or what it gave before for the same name and stamp.

    Args:
        stamp: changes whenever the result may; a list of what JSON can hold.
        memory_path: JSON file that remembers.
    """
    memory_path = os.path.expanduser(memory_path)
    known = _read(memory_path).get(name)
    if isinstance(known, list) and known[0] == stamp:
        return known[1]
    value = compute()
    _write(memory_path, {**_read(memory_path), name: [stamp, value]})
    return value


def file_stamp(path: str) -> list[int]:
    """Changes whenever the file does."""
    status = os.stat(path)
    # Copying tools keep size and modification time; no tool sets the time of the last change of the inode.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(memory_path: str) -> dict:
    try:
        with open(memory_path) as memory_file:
            memory = json.load(memory_file)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _write(memory_path: str, memory: dict) -> None:
    unfinished = f"{memory_path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(memory_path), exist_ok=True)
        with open(unfinished, "w") as memory_file:
            json.dump(memory, memory_file)
        os.replace(unfinished, memory_path)
    except OSError:
        pass  # it only saves time: the file is read again


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, asked once: loading would spend most of a minute on retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # the network's own exceptions depend on the http library in use
        return False
    return True
