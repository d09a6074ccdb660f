"""Processes that read chunks of rows."""

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import TYPE_CHECKING

from pipa_openrlhf.child_process import ChildProcess
from pipa_openrlhf.errors import UserError, first_line

if TYPE_CHECKING:
    from pipa_openrlhf.data.prepare import Reader, RowChunk, SampleChunk

_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_WAITING = 3  # chunks a worker that may be read and not yet taken; all of them are in memory


class CannotStart(Exception):
    """There are no workers; the message says why."""


class _Worker(ChildProcess):
    def receive(self):
        """What it replies; raised, if that is an error."""
        reply = self.connection.recv()
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Workers:
    """A context within which ``count`` processes read.

    Raises:
        CannotStart: the tokenizer cannot be handed over.
    """

    def __init__(self, reader: "Reader", count: int):
        self._reader, self._count = reader, count
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        try:
            work = ForkingPickler.dumps(self._reader)
        except Exception as error:  # of whatever the tokenizer holds
            raise CannotStart(first_line(error)) from error
        try:
            for _ in range(self._count):
                self._workers.append(_Worker(f"{__name__}.work", environment=_ONE_THREAD))
            for worker in self._workers:
                worker.connection.send_bytes(work)
            for worker in self._workers:
                worker.receive()
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
        for worker in self._workers:
            worker.end()

    def read(self, chunks: "Iterator[RowChunk]") -> "Iterator[SampleChunk]":
        """Results in the order of the chunks.

        Raises:
            UserError: as the reader does.
            RuntimeError: a worker failed.
        """
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def ask(chunk: "RowChunk") -> "SampleChunk":
            worker = free.get()
            try:
                worker.connection.send(chunk)
                return worker.receive()
            except (OSError, EOFError) as error:
                status = worker.process.wait()
                raise RuntimeError(f"a process that prepares data ended with status {status}") from error
            finally:
                free.put(worker)

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


def work(handle: int) -> None:
    """A worker: receives its reader, then chunks, until there are no more.

    Args:
        handle: file descriptor of its connection.
    """
    connection, reader = Connection(handle), None
    while True:
        reply: object = None
        try:
            received = connection.recv()
            if reader is None:
                reader = received
            else:
                reply = reader(received)
        except (EOFError, ConnectionError):
            return
        except UserError as error:
            reply = error
        except Exception as error:
            reply = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
        try:
            connection.send(reply)
        except ConnectionError:
            return
