"""A process that compares answers by math-verify: JSON in, JSON out, until there is no more.

math-verify's own time limits are switched off: they work by a signal, which fails off the main thread and does not
reach code in C. Whoever started this process kills it instead.
"""

import json
import logging
import resource
from multiprocessing.connection import Connection

_BYTES = 4 << 30
_SPARE_SECONDS = 5


def work(handle: int, seconds: float) -> None:
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
