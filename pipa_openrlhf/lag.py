"""Files that another machine has just written: a file server shows them late, and they are waited for."""

import os
import time
from collections.abc import Callable, Sequence

# Seconds within which a file server shows every node what another one wrote; NFS remembers a listing for up to 60.
LAG = 90.0


def wait_until(is_there: Callable[[], bool]) -> bool:
    """Ask until it is so, or ``LAG`` seconds are over; the last answer."""
    end = time.monotonic() + LAG
    while not is_there():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def first_missing(folder: str, names: Sequence[str]) -> str | None:
    """The first of ``names`` that is not in ``folder`` once a file server had its time; None: all are there."""

    def missing() -> list[str]:
        # Looking into a folder makes a client ask its server, which opening a file that was not there may not.
        try:
            found = set(os.listdir(folder))
        except OSError:
            return list(names)
        return [name for name in names if name not in found]

    wait_until(lambda: not missing())
    return next(iter(missing()), None)
