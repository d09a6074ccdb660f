"""Processes that read chunks of rows.

They are started as commands of their own, with a pipe to and from each. Neither is the process forked, whose threads
of torch and tokenizers would not survive it, nor is its main module imported again, which need not be made for that.
A worker ends when its pipe does, so that none is left behind, however the parent ends.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from pipa_openrlhf.data.reading import Reader, RowChunk, SampleChunk
from pipa_openrlhf.errors import UserError, first_line

_WAITING = 3  # chunks a worker that may be read and not yet taken; all of them are in memory


class CannotStart(Exception):
    """There are no workers; the message says why."""


class Workers:
    """A context within which ``count`` processes read.

    Raises:
        CannotStart: the tokenizer cannot be handed over.
    """

    def __init__(self, reader: Reader, count: int):
        self._reader, self._count = reader, count
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Workers":
        try:
            work = pickle.dumps(self._reader)
        except Exception as error:  # of whatever the tokenizer holds
            raise CannotStart(first_line(error)) from error
        quiet = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        try:
            for _ in range(self._count):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", "from pipa_openrlhf.data.workers import work; work()"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        env={**os.environ, **quiet, **paths},
                        start_new_session=True,  # a ctrl-C is the parent's, which ends them
                    )
                )
            for process in self._processes:
                _send(process, work)
            for process in self._processes:
                _receive(process)
        except (OSError, EOFError, RuntimeError) as error:
            self._end()
            raise CannotStart(first_line(error)) from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was still to be sent
                    pipe.close()  # type: ignore[union-attr]

    def read(self, chunks: Iterator[RowChunk]) -> Iterator[SampleChunk]:
        """Results in the order of the chunks.

        Raises:
            UserError: as the reader does.
            RuntimeError: a worker failed.
        """
        free: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self._processes:
            free.put(process)

        def ask(chunk: RowChunk) -> SampleChunk:
            process = free.get()
            try:
                _send(process, pickle.dumps(chunk))
                return _receive(process)
            except (OSError, EOFError) as error:
                raise RuntimeError(f"a process that prepares data ended with status {process.poll()}") from error
            finally:
                free.put(process)

        pending: deque[Future[SampleChunk]] = deque()
        threads = ThreadPoolExecutor(self._count)
        try:
            for chunk in chunks:
                pending.append(threads.submit(ask, chunk))
                if len(pending) >= _WAITING * self._count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            self._end()  # a thread may wait for one
            threads.shutdown(cancel_futures=True)


def _send(process: subprocess.Popen, message: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(message)
    process.stdin.flush()


def _receive(process: subprocess.Popen):
    assert process.stdout is not None
    reply = pickle.load(process.stdout)
    if isinstance(reply, BaseException):
        raise reply
    return reply


def work() -> None:
    """A worker: reads its reader, then chunks, until there are no more."""
    given, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with replies
    reader = None
    while True:
        reply: object = None
        try:
            received = pickle.load(given)
            if reader is None:
                reader = received
            else:
                reply = reader(received)
        except EOFError:
            return
        except UserError as error:
            reply = error
        except Exception as error:
            reply = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
        try:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
        except BrokenPipeError:
            return
