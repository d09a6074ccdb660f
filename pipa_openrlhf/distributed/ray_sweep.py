"""The trials of a sweep on a Ray cluster: the prior's log-probs for all of them, then each in a place of its own.

A trial is a Ray task that runs two commands, a training and its evaluation, as a user would: no search or early stop
decides between trials, so that Ray Tune would only add its own checkpoints, folders and processes to those of the
commands. A command is a process of its own: what it leaves in memory, and how it ends, is not the next one's.
"""

import ctypes
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.ray_launch import (
    check_installed,
    connect,
    default_resources,
    parse_resources,
    wait_for_place,
)
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.evaluate import sweep_table
from pipa_openrlhf.evaluate.results import SUMMARY_FILE
from pipa_openrlhf.evaluate.sweep_table import TrialRow
from pipa_openrlhf.generate.config import EvaluateConfig
from pipa_openrlhf.generate.problems import digest_of, read_problems
from pipa_openrlhf.lag import first_missing
from pipa_openrlhf.settings import check_bounds, flatten, setting, to_yaml, updated

log = logging.getLogger(__name__)

_RESOURCES = "--ray.resources_per_trial"
# Starts of a trial whose machine was lost, after the first.
_RETRIES = 2
_MODEL, _LOG, _STARTED = "model", "log.txt", "started.txt"


@dataclass(frozen=True)
class SweepSettings:
    """Which trials, and where they go."""

    file: str | None = setting(None, "YAML file of the grid, see docs/clusters.md", is_path=True)
    output_dir: str | None = setting(
        None, "gets results.md, results.jsonl and a folder a trial; a sweep there goes on", is_written=True
    )


@dataclass(frozen=True)
class TrialSettings:
    """The place of a trial."""

    ranks_per_trial: int = setting(1, "processes of a trial, on one node", least=1)
    resources_per_trial: str | None = setting(
        None,
        """JSON, such as '{"GPU": 1, "CPU": 8}'; unset: a GPU for each rank where the cluster has one, else a CPU""",
    )
    address: str | None = setting(
        None,
        "of a cluster, or local: one of its own; unset: RAY_ADDRESS, one on this machine, or one of its own",
    )
    wait_seconds: float = setting(60, "longest wait for the resources of all workers, or of one trial", least=0)


@dataclass(frozen=True)
class SweepConfig:
    """Of ``cli/sweep_ray.py``."""

    sweep: SweepSettings = field(default_factory=SweepSettings)
    ray: TrialSettings = field(default_factory=TrialSettings)

    def check(self) -> None:
        """Raises UserError."""
        check_bounds(self)
        for flag, value in (("file", self.sweep.file), ("output_dir", self.sweep.output_dir)):
            if not value:
                raise UserError(f"--sweep.{flag} is required")
        parse_resources(self.ray.resources_per_trial, _RESOURCES)
        check_installed("sweep_ray")


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        point: axis of the grid to value, as they are shown.
        config: of its training, but for its folders.
        evaluation: but for the model and the folder.
    """

    point: dict[str, str]
    config: RunConfig
    evaluation: EvaluateConfig

    @property
    def name(self) -> str:
        """Its point in the grid."""
        return TrialRow(0, self.point).name

    def check(self) -> None:
        """Raises UserError."""
        from pipa_openrlhf.training.run import checked

        checked(self.config)
        # What is evaluated is not there yet, and no other flag depends on it.
        updated(
            self.evaluation, {"model.model_name_or_path": self.config.model.path, "evaluate.output_dir": "."}
        ).check()

    def evaluation_id(self) -> str:
        """Digest of what decides the evaluation but for the model.

        Raises:
            UserError: the problems cannot be read.
        """
        asked = self.evaluation
        problems = read_problems(asked.problems.path, asked.problems.max, asked.problems.split, asked.use_ms)
        examples = read_problems(asked.prompt.few_shot) if asked.prompt.few_shot else []
        settings = {name: value for name, value in flatten(asked).items() if name != "problems.file"}
        parts = [settings, digest_of(problems), digest_of(examples)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Sweep:
    """The trials of one output folder, one sweep at a time.

    Args:
        folder: of the sweep; every node sees it.
        ranks: processes of a command.

    Attributes:
        rows: what became of each trial.
    """

    def __init__(self, folder: str, trials: Sequence[Trial], ranks: int):
        self._folder, self._trials, self.ranks = folder, trials, ranks
        self._evaluation_ids = [trial.evaluation_id() for trial in trials]
        self.rows = [TrialRow(number, trial.point) for number, trial in enumerate(trials, start=1)]

    def prior_pass(self) -> tuple[list[list[str]], str]:
        """The command that scores the prior for all trials and finds out what each of them is, and its log."""
        folder = os.path.join(self._folder, "prior_pass")
        os.makedirs(folder, exist_ok=True)
        words = ["fill_prior", "--fill.report", self._report, "--fill.started", self._started(), "--fill.configs"]
        if os.path.exists(self._report):
            os.remove(self._report)
        for number, trial in enumerate(self._trials, start=1):
            path = os.path.join(folder, f"trial{number}.yaml")
            _write(path, to_yaml(trial.config))
            words.append(path)
        return [words], os.path.join(folder, _LOG)

    def take_identities(self, problem: str | None) -> None:
        """Give every trial its folder, by what decides it; those whose folders hold a result already have finished.

        Args:
            problem: why the prior pass did not come to its end; None: it did.

        Raises:
            UserError: two trials are the same.
        """
        if problem is None:
            first_missing(os.path.dirname(self._report), [os.path.basename(self._report)])
        found = _read_rows(self._report)
        for index, row in enumerate(self.rows):
            known = found[index] if index < len(found) else {"error": f"the prior pass ended before: {problem}"}
            if "error" in known:
                self._set(index, row.failed(known["error"]))
                continue
            # A run that has finished may go on with more epochs; here it is another trial.
            epochs = self._trials[index].config.train.max_epochs
            identity = hashlib.sha256(f"{known['identity']} {epochs}".encode()).hexdigest()
            same = next((one for one in self.rows if one.identity == identity), None)
            if same is not None:
                raise UserError(f"two trials are the same run: {same.name} and {row.name}; remove one value")
            folder = os.path.join(self._folder, "trials", identity[:16])
            self.rows[index] = replace(row, identity=identity, folder=folder)
            if os.path.exists(os.path.join(self._evaluation(index), SUMMARY_FILE)):
                self._set(index, self.rows[index].finished(self._evaluation(index)))

    def waiting(self) -> list[int]:
        """Indices of the trials that neither finished nor failed."""
        return [index for index, row in enumerate(self.rows) if row.state == "waiting"]

    def commands(self, index: int) -> tuple[list[list[str]], str]:
        """Training and evaluation of a trial, and their log."""
        trial, folder = self._trials[index], str(self.rows[index].folder)
        os.makedirs(folder, exist_ok=True)
        model = os.path.join(folder, _MODEL)
        settings = {"model.model_name_or_path": model, "evaluate.output_dir": self._evaluation(index)}
        configs = {
            "train": updated(trial.config, {"ckpt.output_dir": model}),
            "evaluate": updated(trial.evaluation, settings),
        }
        words = []
        for command, config in configs.items():
            path = os.path.join(folder, f"{command}.yaml")
            _write(path, to_yaml(config))
            words.append([command, "--config", path])
        return words, os.path.join(folder, _LOG)

    def end(self, index: int, problem: str | None) -> None:
        """Take down what became of a trial, and say it."""
        row, evaluation = self.rows[index], self._evaluation(index)
        if not problem:
            first_missing(evaluation, [SUMMARY_FILE])
        try:
            self._set(index, row.failed(problem) if problem else row.finished(evaluation))
        except UserError as error:  # stopped by a signal, a command ends with 0
            self._set(index, row.failed(f"it was stopped before its end ({error})"))

    def write(self) -> None:
        """The table of all trials."""
        sweep_table.write(self._folder, self.rows)

    @property
    def _report(self) -> str:
        return os.path.join(self._folder, "prior_pass", "report.jsonl")

    def _evaluation(self, index: int) -> str:
        return os.path.join(str(self.rows[index].folder), f"evaluation-{self._evaluation_ids[index][:16]}")

    def _started(self) -> str:
        """When the sweep was first started: templates that write a date write the same one ever after."""
        path = os.path.join(self._folder, _STARTED)
        if not os.path.exists(path):
            _write(path, datetime.now().isoformat(timespec="seconds"))
        with open(path) as file:
            return file.read().strip()

    def _set(self, index: int, row: TrialRow) -> None:
        self.rows[index] = row
        result = f"failed: {row.why}" if row.state == "failed" else f"{row.score} {row.value:.1%}"
        log.info(f"Trial {row.trial} of {len(self.rows)} ({row.name}): {result}")


def run_sweep(config: SweepConfig, sweep: Sweep) -> None:
    """Run what has not finished yet; afterwards every row of ``sweep`` has finished or failed.

    Raises:
        UserError: a trial finds no place on the cluster, or two trials are the same.
    """
    import ray

    is_own = connect(config.ray.address)
    try:
        asked = parse_resources(config.ray.resources_per_trial, _RESOURCES)
        resources = asked or default_resources(ray.cluster_resources(), sweep.ranks)
        wait_for_place([resources], config.ray.wait_seconds, is_own, f"lower {_RESOURCES}")
        task = ray.remote(run_commands).options(max_retries=_RETRIES, **_as_options(resources))
        log.info(f"Scoring the prior for {len(sweep.rows)} trials")
        sweep.take_identities(_result(task.remote(*sweep.prior_pass(), sweep.ranks)))
        sweep.write()
        running = {task.remote(*sweep.commands(index), sweep.ranks): index for index in sweep.waiting()}
        while running:
            (done,), _ = ray.wait(list(running))
            sweep.end(running.pop(done), _result(done))
            sweep.write()
    finally:
        ray.shutdown()


def _as_options(resources: dict[str, float]) -> dict:
    """As Ray's tasks take them."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}


def _result(task) -> str | None:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:  # a disk that is full, where its log goes
        return first_line(error.cause)
    except ray.exceptions.RayError as error:
        return (
            f"its worker was killed, ran out of memory, or lost its node, {_RETRIES + 1} times ({first_line(error)})"
        )


def run_commands(commands: list[list[str]], log_path: str, ranks: int) -> str | None:
    """On a worker: one command after the other, with what they print in a file; why one failed, None where none did.

    Should the worker be killed, its command is asked to stop.
    """
    parent, folder = os.path.split(os.path.dirname(log_path))
    if first_missing(parent, [folder]):
        return f"{socket.gethostname()} does not see {parent}/{folder}: give an --sweep.output_dir that all nodes see"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    for module, *flags in commands:
        words = [sys.executable, "-m", *launcher, f"pipa_openrlhf.cli.{module}", *flags]
        with open(log_path, "ab") as file:
            begin = file.tell()
            status = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, preexec_fn=_end_with_parent
            ).wait()
        if status != 0:
            return _cause(log_path, begin, status)
    return None


def _end_with_parent() -> None:
    """Linux sends a SIGTERM to this process when the one that started it has gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _cause(log_path: str, begin: int, status: int) -> str:
    """The first error that a command names; else its last line, or the signal that ended it."""
    with open(log_path, "rb") as file:
        file.seek(begin)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if status < 0:
        return f"ended by {signal.Signals(-status).name}; see {log_path}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[0] if errors else f"{lines[-1] if lines else f'exit status {status}'}; see {log_path}"


def _write(path: str, text: str) -> None:
    """Whole or not at all, and for this user alone: settings may hold a key of wandb."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
    os.replace(f"{path}.new", path)


def _read_rows(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
