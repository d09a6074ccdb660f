"""Trainers in processes of their own that take turns: one round at a time, at the parent's word.

A round is a fixed number of optimizer steps. The commands are ``round``, ``count`` (a round with its FLOPs counted),
``prior`` and ``count prior`` (our prior pass), and ``sequences`` (what was trained on).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from inputs import ROOT
from measure import Meter


class WorkerFailed(Exception):
    """The first line of what went wrong."""


class Worker:
    """The parent's end.

    Args:
        spec: a ``workers.Spec``.
        log: file that gets what the worker prints.
    """

    def __init__(self, spec, log: Path):
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        # Threads of waiting workers must sleep; caches of earlier runs must not be found.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        caches = {"HF_DATASETS_CACHE": f"{spec.folder}/datasets"}
        script = Path(__file__).with_name("workers.py")
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(asdict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path, **quiet, **caches},
            )

    def read(self) -> dict:
        """The next reply.

        Raises:
            WorkerFailed: the worker ended.
        """
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"the process ended with status {self._process.wait()}"}
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def ask(self, command: str) -> dict:
        """Send a command and wait for its reply."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Gate:
    """The worker's end: lets its trainer run one round at a time.

    Args:
        steps_per_round: optimizer steps.
        imports: everything that any arm imports. It happens here, because libraries print while they are imported and
            memory is looked at right after.

    Attributes:
        prior_pass: what ``prior`` measures.
        sequences: what ``sequences`` replies.
    """

    def __init__(self, steps_per_round: int, imports: Callable[[], None]):
        self._steps_per_round = steps_per_round
        self._steps = 0
        self._commands = os.fdopen(os.dup(0))
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries and trainers print must not mix with replies
        imports()
        self._meter = Meter()
        self.prior_pass: Callable[[], None] | None = None
        self.sequences: Callable[[], dict] | None = None

    def reply(self, message: dict) -> None:
        """Send one line."""
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def start(self) -> None:
        """Called where the trainer is about to enter its loop."""
        self.reply({"ready": True})
        self._wait()

    def step_done(self) -> None:
        """Called at the end of every optimizer step."""
        self._steps += 1
        if self._steps % self._steps_per_round == 0:
            self.reply(self._meter.stop())
            self._wait()

    def _wait(self) -> None:
        while True:
            command = self._commands.readline().strip()
            if command in ("round", "count"):
                self._meter.start(counts_flops=command == "count")
                return
            if command in ("prior", "count prior"):
                self._meter.start(counts_flops=command == "count prior")
                self.prior_pass()
                self.reply(self._meter.stop())
            elif command == "sequences":
                self.reply(self.sequences())
            else:
                # The parent is gone. Nothing of the trainer's end (export, checkpoints) is wanted.
                os._exit(0)
