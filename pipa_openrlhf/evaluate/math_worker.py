"""A process that compares answers by math-verify: a line of JSON in, a line out, until there are no more.

math-verify's own time limits are switched off: they work by a signal, which fails off the main thread and does not
reach code in C. Whoever started this process kills it instead.
"""

import json
import logging
import os
import resource
import sys

_BYTES = 4 << 30
_SPARE_SECONDS = 5


def work(seconds: float) -> None:
    """Compare ``[gold, prediction]`` pairs of standard input.

    Args:
        seconds: of CPU that a pair may take. The parent kills earlier; this ends a worker whose parent has died.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with replies
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.RLIM_INFINITY))
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off
    print(json.dumps(True), file=replies, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + seconds) + _SPARE_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        gold, prediction = (parse(text, parsing_timeout=None) for text in json.loads(line))
        same = verify(gold, prediction, timeout_seconds=None)  # in this order: it is not symmetric
        print(json.dumps(same), file=replies, flush=True)
