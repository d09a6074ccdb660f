"""A Python process beside this one, spoken to by a connection."""

import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection


class ChildProcess:
    """Runs a function of an installed module, which is given the handle of its connection, then ``arguments``.

    It is a command of its own. Neither is this process forked, whose threads of torch and tokenizers would not survive
    that, nor is its main module imported again, which need not be made for it. A child that reads its connection ends
    with it, so that none is left behind, however this process ends.

    Args:
        function: ``package.module.name``.
        arguments: as they are written in Python.
        environment: variables that it has beside this process's.

    Attributes:
        process: what runs; nothing of what it prints on standard output is shown.
        connection: this side's end.
    """

    def __init__(self, function: str, *arguments: object, environment: Mapping[str, str] = {}):  # noqa: B006
        module, _, name = function.rpartition(".")
        paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        ours, theirs = Pipe()
        with theirs:
            call = ", ".join(map(repr, (theirs.fileno(), *arguments)))
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {module} import {name}; {name}({call})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **paths, **environment},
                start_new_session=True,  # a ctrl-C is this process's, which ends it
            )
        self.connection: Connection = ours

    def end(self) -> None:
        """Kill it. Whoever waits for its reply in another thread gets an EOFError."""
        self.process.kill()
        self.process.wait()
