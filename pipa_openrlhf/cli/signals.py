"""Ctrl-C and SIGTERM as a question that the trainer asks once a step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """While it is open, the first SIGINT or SIGTERM only makes the callable it yields return True.

    A second ctrl-C interrupts at once. The handlers of before come back at the end. Main thread only.

    Raises:
        KeyboardInterrupt: on a second ctrl-C.
    """
    received: list[int] = []

    def on_signal(number: int, _frame) -> None:
        # On ctrl-C a launcher sends SIGTERM on top of the terminal's SIGINT; only a second ctrl-C means "at once".
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
