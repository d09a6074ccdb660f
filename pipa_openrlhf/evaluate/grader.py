"""Compare answers with the right ones: plainly where that is enough, else by math-verify.

Algebra on what a model wrote may take for ever or all of the memory, so it is done in processes with a hard limit.
"""

import json
import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

from pipa_openrlhf.child_process import ChildProcess
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.grading import as_mathematics, compare_plainly

_START_SECONDS = 120.0  # importing sympy on a busy machine
_SECONDS = 10.0
_MOST_PROCESSES = 8

Pair = tuple[str, str]


def grader_name() -> str:
    """What grades, and its version: another grader calls other answers right.

    Raises:
        UserError: it is not installed.
    """
    try:
        return f"math-verify {version('math-verify')} after equal numbers and equal text"
    except PackageNotFoundError:
        raise UserError("math-verify, which grades answers, is missing: run scripts/install.sh again") from None


class Grader:
    """A context within which answers are compared. Its processes start when they are first needed.

    Args:
        seconds: that a pair may take; then it is wrong, and its process killed.
        processes: at most; None: one a core, up to eight.

    Attributes:
        given_up: pairs whose process was killed for time, or died, of memory for example. They count as wrong.
    """

    def __init__(self, seconds: float = _SECONDS, processes: int | None = None):
        count = processes or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self._processes = [_Process(seconds) for _ in range(count)]
        self._known: dict[Pair, bool] = {}
        self.given_up = 0

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end()

    def same(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """Whether each ``(prediction, gold)`` is the same answer; a prediction of None is not.

        Raises:
            UserError: a process cannot be started.
        """
        plain = [prediction is not None and compare_plainly(prediction, gold) for prediction, gold in pairs]
        forms = [(as_mathematics(gold), as_mathematics(prediction or "")) for prediction, gold in pairs]
        self._compare({pair for pair, known in zip(forms, plain) if known is None and pair not in self._known})
        return [self._known[pair] if known is None else known for pair, known in zip(forms, plain)]

    def _compare(self, pairs: set[Pair]) -> None:
        if not pairs:
            return
        free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            free.put(process)

        def compare(pair: Pair) -> bool | None:
            process = free.get()
            try:
                return process.compare(pair)
            finally:
                free.put(process)

        ordered = sorted(pairs)
        threads = ThreadPoolExecutor(len(self._processes))
        try:
            answers = list(threads.map(compare, ordered))
        except BaseException:
            for process in self._processes:
                process.end()  # a thread may wait for one
            raise
        finally:
            threads.shutdown(cancel_futures=True)
        self.given_up += answers.count(None)
        self._known |= {pair: answer is True for pair, answer in zip(ordered, answers)}


class _Process:
    """One process of ``math_worker``, started when it is first asked and again after it was killed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._child: ChildProcess | None = None

    def compare(self, pair: Pair) -> bool | None:
        """None where there was no reply in time, or the process died of the pair."""
        if self._child is not None and self._child.process.poll() is not None:
            self.end()  # killed from outside, which says nothing about this pair
        reply = _ask(self._child or self._start(), pair, self._seconds)
        if reply is None:
            self.end()
        return reply

    def end(self) -> None:
        """Kill the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _start(self) -> ChildProcess:
        self._child = child = ChildProcess("pipa_openrlhf.evaluate.math_worker.work", self._seconds)
        if _reply(child, _START_SECONDS) is None:
            self.end()
            raise UserError("a process that grades answers does not start: see its message above, or free some memory")
        return child


def _ask(child: ChildProcess, pair: Pair, seconds: float) -> bool | None:
    try:
        child.connection.send_bytes(json.dumps(pair).encode())
    except ConnectionError:
        return None
    return _reply(child, seconds)


def _reply(child: ChildProcess, seconds: float) -> bool | None:
    """JSON: what a process sends that was fed the text of a model is not unpickled. None where nothing comes."""
    try:
        return json.loads(child.connection.recv_bytes()) if child.connection.poll(seconds) else None
    except (EOFError, ConnectionError):
        return None
