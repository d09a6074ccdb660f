"""Find the final answer in a text, and compare it with the right one: plainly where that is enough, else by algebra.

Algebra (math-verify) on what a model wrote may take for ever or all of the memory, so it is done in processes with a
hard limit. Its own time limits are switched off: they work by a signal, which fails off the main thread and does not
reach code in C. Whoever started such a process kills it instead.
"""

import json
import logging
import os
import queue
import re
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from types import TracebackType

from pipa_openrlhf.child_process import ChildProcess
from pipa_openrlhf.errors import UserError

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
# JSON writes 0.00005 as 5e-05. Longer exponents are not those of a float, and would take for ever.
_NUMBER = re.compile(rf"([-+]?)\s*(?:\\?\$)?\s*({_DIGITS}(?:e[-+]?\d{{1,3}})?)(?:\s*/\s*([-+]?{_DIGITS}))?")
_FINAL_ANSWER = re.compile(r"final answer\s*:(.*)", re.IGNORECASE)
# What surrounds an answer without being part of it: bold, a math or dollar sign, a percent sign, a full stop.
_MARKS_BEFORE = re.compile(r"(?:\*|\\?\$|\s)+")
_MARKS_AFTER = re.compile(r"(?:\*|\\?\$|\\?%|\.|\s)+$")
_DELIMITERS_AROUND = re.compile(r"^(?:\*|\\?\$|\\[(\[]|\s)+|(?:\*|\\?\$|\\[)\]]|\.|\s)+$")
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|[ \t]+([^\s$\\{}]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

_START_SECONDS = 120.0  # importing sympy on a busy machine
_SECONDS = 10.0
_MOST_PROCESSES = 8

_Pair = tuple[str, str]

_BYTES = 4 << 30
_SPARE_SECONDS = 5


def extract_answer(text: str) -> str | None:
    """The answer a text commits to, or None where it has no marker.

    Markers, in this order: the first ``####`` line (what follows it may answer another question), the last
    ``\\boxed{}``, the last ``Final Answer:`` line. Markers inside ``<think>...</think>`` do not count.
    """
    text = _without_thoughts(text)
    if "####" in text:
        answer = text.split("####", 1)[1].split("\n", 1)[0]
    elif (boxed := last_boxed(text)) is not None:
        answer = boxed
    elif found := _FINAL_ANSWER.findall(text):
        answer = found[-1]
    else:
        return None
    inner = last_boxed(answer)
    answer = (answer if inner is None else inner).strip()
    return answer or None


def committed_answer(text: str, finished: bool = True) -> str | None:
    """The answer of a text that may have been stopped for length.

    The last line of an unfinished text is cut off somewhere, so only the lines before it count.
    """
    return extract_answer(text if finished else text.rpartition("\n")[0])


def compare_plainly(prediction: str, gold: str) -> bool | None:
    """Compare what needs no algebra; None where the two must be read as mathematics.

    Two numbers are compared exactly, and the same text up to case, spaces and marks is the same answer. Braces that do
    not match would let a prediction out of the ``\\boxed{}`` that it is read in: it is wrong.
    """
    numbers = parse_number(prediction), parse_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _bare(prediction) == _bare(gold):
        return True
    return None if _has_matched_braces(prediction) else False


def as_mathematics(answer: str) -> str:
    """The answer as LaTeX that math-verify reads whole."""
    answer = _DELIMITERS_AROUND.sub("", answer)
    # A dollar sign would end the formula, and "3$4" must not become 34.
    return "$\\boxed{" + answer.replace("\\$", " ").replace("$", " ").strip() + "}$"


def parse_number(text: str) -> Fraction | None:
    """``"$1,200.50"``, ``"3/4"``, ``"50%"``, ``"5e-05"``, ``"57."`` as an exact number; None for anything else.

    A percent sign is dropped as a dollar sign is: 50% is 50. A mark between digits makes the text no number.
    """
    found = _NUMBER.fullmatch(_bare(text))
    if found is None:
        return None
    try:
        top, bottom = (Fraction(part.replace(",", "")) for part in (found[1] + found[2], found[3] or "1"))
        return top / bottom
    except (ValueError, ZeroDivisionError):
        return None


def _bare(text: str) -> str:
    """Lower case, single spaces, and no marks at either end."""
    text = " ".join(text.replace("−", "-").split()).lower()
    text = _MARKS_AFTER.sub("", text)
    marks = _MARKS_BEFORE.match(text)
    return text[marks.end() :] if marks else text


def _without_thoughts(text: str) -> str:
    """The text outside think blocks; a prompt may have opened one, and an unfinished text may not close its last."""
    outside, opened, rest = text.partition("<think>")
    while opened:
        _, closed, rest = rest.partition("</think>")
        if not closed:
            break
        before, opened, rest = rest.partition("<think>")
        outside += before
    return outside.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` or ``\\fbox{}`` holds; ``\\boxed 5`` holds one word. None where it is not closed."""
    *_, found = [None, *_BOX.finditer(text)]
    if found is None:
        return None
    if found[1] is not None:
        return found[1]
    depth = 1
    for brace in _BRACE.finditer(text, found.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[found.end() : brace.start()]
    return None


def _has_matched_braces(text: str) -> bool:
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return False
    return depth == 0


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
        self._known: dict[_Pair, bool] = {}
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

    def _compare(self, pairs: set[_Pair]) -> None:
        if not pairs:
            return
        free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            free.put(process)

        def compare(pair: _Pair) -> bool | None:
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
    """One process that runs :func:`compare_pairs`, started when it is first asked and again after it was killed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._child: ChildProcess | None = None

    def compare(self, pair: _Pair) -> bool | None:
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
        self._child = child = ChildProcess(f"{__name__}.compare_pairs", self._seconds)
        if _reply(child, _START_SECONDS) is None:
            self.end()
            raise UserError("a process that grades answers does not start: see its message above, or free some memory")
        return child


def _ask(child: ChildProcess, pair: _Pair, seconds: float) -> bool | None:
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


def compare_pairs(handle: int, seconds: float) -> None:
    """Compare ``[gold, prediction]`` pairs.

    Args:
        handle: file descriptor of the connection that they come by.
        seconds: of CPU that a pair may take. The parent kills earlier; this ends a worker whose parent has died.
    """
    connection = Connection(handle)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.RLIM_INFINITY))
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off
    connection.send_bytes(b"true")
    while True:
        try:
            pair = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + seconds) + _SPARE_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        gold, prediction = (parse(text, parsing_timeout=None) for text in pair)
        same = verify(gold, prediction, timeout_seconds=None)  # in this order: it is not symmetric
        connection.send_bytes(json.dumps(same).encode())
