"""Trainers in processes of their own that take turns: one round at a time, at the parent's word.

A round is one pass over the data. The commands are ``round``, ``count`` (a round with its FLOPs counted), ``prior``
and ``count prior`` (our prior pass), ``sequences`` (what was trained on), and ``least`` (the least FLOPs of ours).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from inputs import ROOT, sequence_key
from measure import Meter

# Arms that need other versions than ours, and the variable that says which Python has them.
APART = {"swift_kto": "SWIFT_PYTHON", "swift_dpo": "SWIFT_PYTHON", "flash_pref": "FLASH_PREF_PYTHON"}


@dataclass(frozen=True)
class Spec:
    """What one worker runs.

    Attributes:
        model: folder.
        folder: scratch, with the data of ``inputs.write_data``.
        batch_size, micro_batch_size: sequences; a pair is two.
        steps_per_round: optimizer steps of a pass over the data.
        rank: of LoRA on all linear layers but the output head.
    """

    arm: str
    model: str
    folder: str
    dtype: str
    checkpointing: bool
    batch_size: int
    micro_batch_size: int
    steps_per_round: int
    max_length: int
    rank: int
    # So small that the log-probs of the first round are those of the initial policy.
    learning_rate: float = 1e-9
    epochs: int = 10000


class WorkerFailed(Exception):
    """The first line of what went wrong."""


class Worker:
    """The parent's end.

    Args:
        log: file that gets what the worker prints.

    Raises:
        WorkerFailed: the arm needs another Python, and none is named.
    """

    def __init__(self, spec: Spec, log: Path):
        python, script = sys.executable, "workers.py"
        if variable := APART.get(spec.arm):
            script = "peers_apart.py"
            python = os.environ.get(variable, "")
            if not python:
                raise WorkerFailed(f"set {variable}, see benchmarks/peers_apart.py")
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        # Threads of waiting workers must sleep; caches of earlier runs must not be found.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        caches = {"HF_DATASETS_CACHE": f"{spec.folder}/datasets"}
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name(script)), json.dumps(asdict(spec))],
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
        replies: what ``sequences`` and ``least`` reply.
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
        self.replies: dict[str, Callable[[], dict]] = {}

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
            elif command in self.replies:
                self.reply(self.replies[command]())
            else:
                # The parent is gone. Nothing of the trainer's end (export, checkpoints) is wanted.
                os._exit(0)


class Recorder:
    """Log-probs that a trainer's own forward passes gave, by sequence."""

    def __init__(self):
        self.log_probs: dict[str, float] = {}

    def add(self, token_ids: list[int], prompt_length: int, log_prob: float) -> None:
        """Keep the first value of a sequence: that of the initial policy."""
        self.log_probs.setdefault(sequence_key(token_ids, prompt_length), float(log_prob))

    def sequences(self) -> dict:
        """As the reply to ``sequences``."""
        return {"log_probs": self.log_probs}
