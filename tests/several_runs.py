"""Two ranks of one process group that carry out one training run after another.

Starting a launcher and two ranks takes twenty times as long as a run of a tiny model. This file is also the program
that is each of the ranks.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tiny import run_in_process

from pipa_openrlhf import lag


class TwoRanks:
    """Start both ranks at the first run; after a run that failed on one of them the next one gets new ones.

    Args:
        folder: for what the runs print.
        nodes: working folder of each rank, for paths that are not the same on two machines; None: this process's.
        lag: seconds for which a rank waits for what another one wrote; None: as ever.
    """

    def __init__(self, folder: Path, nodes: Sequence[Path] | None = None, lag: float | None = None):
        self._folder, self._nodes, self._lag = folder, nodes, lag
        self._ranks: list[subprocess.Popen] = []
        self._runs = 0

    def run(self, module: str, *flags, timeout: int = 300) -> subprocess.CompletedProcess:
        """What ``tiny.run_module`` returns for two ranks, with the output of rank 0 before that of rank 1."""
        self._ranks = self._ranks or start_ranks(self._nodes, self._lag)
        self._runs += 1
        printed = [f"{self._folder}/run{self._runs}.rank{rank}" for rank in range(2)]
        for process, files in zip(self._ranks, printed):
            process.stdin.write(json.dumps([module, list(map(str, flags)), files]) + "\n")
            process.stdin.flush()
        end = time.monotonic() + timeout
        status = max(answer_of(process, end) for process in self._ranks)
        if status != 0:
            self.close()
        output, errors = ("".join(Path(f"{one}.{name}").read_text() for one in printed) for name in ("out", "err"))
        return subprocess.CompletedProcess([module, *flags], status, output, errors)

    def close(self) -> None:
        """End both ranks, whatever they are doing."""
        for process in self._ranks:
            process.kill()
            process.communicate()
        self._ranks = []


def start_ranks(nodes: Sequence[Path] | None, wait: float | None) -> list[subprocess.Popen]:
    """Both processes in the environment that a launcher makes; they end with their standard input."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TOKENIZERS_PARALLELISM": "false"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, *([str(wait)] if wait is not None else [])],
            cwd=None if nodes is None else nodes[rank],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def answer_of(process: subprocess.Popen, end: float) -> int:
    """Exit status of the run that a rank was given; 1 where none comes before ``end``."""
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
    line = process.stdout.readline() if ready else ""
    return int(line) if line else 1


def carry_out_runs() -> None:
    """Read module, flags and files to print to, line by line; answer each with an exit status."""
    answers = os.fdopen(os.dup(1), "w")
    if len(sys.argv) > 1:
        lag.LAG = float(sys.argv[1])
    for line in sys.stdin:
        module, flags, printed = json.loads(line)
        for number, name in ((1, "out"), (2, "err")):
            with open(f"{printed}.{name}", "w") as file:
                os.dup2(file.fileno(), number)
        try:
            status = run_in_process(module, *flags)
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    carry_out_runs()
