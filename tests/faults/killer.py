"""Start a job, kill a part of it from outside at a moment that is drawn, start it again until it has finished."""

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs
import psutil
from jobs import Job

HANG_SECONDS = 60  # a job that lost a rank has ended by then
_RESTARTS = 5
_LONGEST = 900  # seconds of one attempt, on a machine that others use too
_TARGETS = {
    "no launcher": ("all",),
    "deepspeed": ("rank", "launcher", "launcher's child", "all"),
    "Ray": ("driver", "worker", "raylet", "controller", "all"),
}


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and what it cost.

    Attributes:
        moment: seconds after the start, or what was being written.
        lost_steps: optimizer steps that were done again; 0 for jobs that have none.
        lost_seconds: until the kill, since the last thing on disk that the job goes on from, or since its start.
        seconds: of all attempts together.
        problem: why the job counts as lost; None: it survived.
    """

    job: Job
    target: str
    moment: str
    lost_steps: int
    lost_seconds: float
    seconds: float
    undisturbed_seconds: float
    problem: str | None


class Attempt:
    """A job that runs, in a session of its own."""

    def __init__(self, words: list[str], log: Path, memory: Path, job: Job):
        ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", XDG_CACHE_HOME=str(memory))
        environment["RAY_worker_niceness"] = "0"  # elsewhere they give way to everybody, also on a shared machine
        # The launcher starts `python` from the search path.
        environment["PATH"] = f"{Path(words[0]).parent}:{environment['PATH']}"
        self.started = time.time()
        self.log, self.job = log, job
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Exit status; None: it is still running then."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def members(self) -> list[psutil.Process]:
        """What is alive of it, orphans too."""
        return [one for one in psutil.process_iter() if _session(one.pid) == self.process.pid and _lives(one)]

    def ranks(self) -> list[psutil.Process]:
        """Its processes that train: of a launcher's, the grandchildren that have a rank."""
        return [one for one in self.members() if "RANK" in _environment(one) and _is_module(one)]

    def targets(self) -> dict[str, list[psutil.Process]]:
        """What can be killed by itself now, by its name."""
        first = psutil.Process(self.process.pid)
        if self.job.on_ray:
            parts = {"worker": "ray::RayTrainWorker", "raylet": "raylet", "controller": "ray::TrainController"}
            members = self.members()
            found = {part: [one for one in members if _name(one).startswith(name)] for part, name in parts.items()}
            return {"driver": [first], **found}
        ranks = self.ranks()
        if not ranks:
            return {}
        started = [one for one in self.members() if one not in ranks and one != first]
        return {"rank": ranks, "launcher": [first], "launcher's child": started}

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for one in self.members():
            one.kill()
        self.process.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _is_module(process: psutil.Process) -> bool:
    try:
        return any(word.startswith("pipa_openrlhf.cli.") for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Killer:
    """Kills jobs of one folder.

    Args:
        work: gets inputs, undisturbed runs, and a folder for each kill.
    """

    def __init__(self, work: Path):
        self.work, self.inputs = work, jobs.fresh(work / "inputs")
        jobs.make_inputs(self.inputs)
        self._undisturbed: dict[str, tuple[Path, float]] = {}
        self._left: dict[str, list[str]] = {}

    def undisturbed(self, job: Job) -> tuple[Path, float]:
        """Folder and seconds of the job without a kill, run once."""
        if job.name not in self._undisturbed:
            folder = jobs.fresh(self.work / f"undisturbed {job.name}")
            attempt = self._start(job, folder, free_port())
            status = attempt.wait(_LONGEST)
            if status != 0:
                attempt.kill_all()
                raise RuntimeError(f"{job.name} does not even run undisturbed:\n{attempt.log.read_text()[-3000:]}")
            self._undisturbed[job.name] = folder, time.time() - attempt.started
        return self._undisturbed[job.name]

    def kill_one(self, job: Job, number: int, draw: random.Random) -> Kill:
        """Start, kill, and start again until finished; the folder is left where something is wrong."""
        reference, usual = self.undisturbed(job)
        while True:
            folder, port = jobs.fresh(self.work / f"kill {number}"), free_port()
            attempt = self._start(job, folder, port)
            moment, pattern = self._wait_for_moment(attempt, folder, reference, usual, draw)
            if attempt.process.poll() is None:
                break
            usual *= 0.9  # it was faster than the undisturbed one
        target = self._kill(attempt, draw)
        killed_at = time.time()
        lost_seconds = killed_at - max(attempt.started, jobs.last_kept(folder))
        if pattern and not jobs.is_writing(folder, pattern):
            moment = moment.replace("inside", "right after")
        steps = jobs.steps_done(folder)
        problem = _hangs(attempt, target)
        if target == "worker":  # Ray starts it again
            resumed_from, failure = _resumed_from(attempt.log.read_text().rpartition("; restart 1 of")[2]), None
        else:
            resumed_from, failure = self._restart(job, folder, port)
        seconds = time.time() - attempt.started
        problem = problem or failure or jobs.difference(job, folder, reference)
        if problem is None and not _ends(attempt):
            problem = f"{len(attempt.members())} processes were left behind"
        attempt.kill_all()
        lost_steps = max(0, steps - resumed_from) if resumed_from is not None else 0
        if target.startswith("launcher") and "Model written" in attempt.log.read_text():
            moment, lost_seconds = f"{moment}; it went on", 0.0  # the ranks did not need it
        if problem is None:
            jobs.fresh(folder).rmdir()
        usual = self.undisturbed(job)[1]
        return Kill(job, target, moment, lost_steps, lost_seconds, seconds, usual, problem)

    def _turn(self, key: str, choices: Sequence[str], draw: random.Random) -> str:
        """One of the choices; every one before any comes again."""
        left = self._left.setdefault(key, [])
        if not left:
            left += draw.sample(choices, len(choices))
        return left.pop()

    def _wait_for_moment(
        self, attempt: Attempt, folder: Path, reference: Path, usual: float, draw: random.Random
    ) -> tuple[str, str | None]:
        """Wait for a drawn time, a drawn part of the work, or a moment inside a write; returns its name, and the
        write's pattern."""
        job = attempt.job
        kind = self._turn(job.name, ("time", "work", *sorted(job.writes)), draw)
        if kind == "time":
            after = draw.uniform(0, usual)
            attempt.wait(after)
            return f"after {after:.1f} s", None
        pattern = job.writes.get(kind)
        total = jobs.work_done(job, reference)
        # Only checkpoints are written over and over.
        least = draw.randrange(total) if kind in ("work", "a checkpoint") else 0
        while attempt.process.poll() is None:
            if jobs.work_done(job, folder) >= least and (pattern is None or jobs.is_writing(folder, pattern)):
                break
            time.sleep(0.0005 if pattern else 0.01)
        attempt.wait(0.0 if pattern else draw.uniform(0, 0.1))
        where = f" after {least} of {total}" if least else ""
        return (f"inside {kind}{where}", pattern) if pattern else (f"at work{where}", None)

    def _kill(self, attempt: Attempt, draw: random.Random) -> str:
        """SIGKILL one process, or all; returns what."""
        launcher = "Ray" if attempt.job.on_ray else "deepspeed" if attempt.job.ranks else "no launcher"
        what = self._turn(f"targets under {launcher}", _TARGETS[launcher], draw)
        chosen = attempt.targets().get(what, [])
        if not chosen:
            self._left[f"targets under {launcher}"] += [] if what == "all" else [what]
            os.killpg(attempt.process.pid, signal.SIGKILL)
            return "all"
        one = draw.choice(sorted(chosen, key=lambda process: process.pid))
        rank = _environment(one).get("RANK")
        one.kill()
        return f"rank {rank}" if what == "rank" else what

    def _restart(self, job: Job, folder: Path, port: int) -> tuple[int | None, str | None]:
        """The step that it went on from, and why it did not finish."""
        resumed_from = None
        for _ in range(_RESTARTS):
            attempt = self._start(job, folder, port)
            status = attempt.wait(_LONGEST)
            attempt.kill_all()
            said = attempt.log.read_text()
            resumed_from = _resumed_from(said) if resumed_from is None else resumed_from
            if status == 0:
                return resumed_from, None
            if status is None:
                return resumed_from, f"did not finish within {_LONGEST} s"
            time.sleep(1)
        return resumed_from, f"did not finish in {_RESTARTS} restarts: {_last_line(said)}"

    def _start(self, job: Job, folder: Path, port: int) -> Attempt:
        number = len(list(folder.glob("attempt*.log")))
        words = jobs.command(job, self.inputs, folder, port)
        return Attempt(words, folder / f"attempt{number}.log", self.work / "memory", job)


def _hangs(attempt: Attempt, target: str) -> str | None:
    """What is wrong with how the rest of a job takes the death of one process; None: nothing."""
    if target == "worker":
        status = attempt.wait(_LONGEST)
        if status is None:
            return f"was not finished {_LONGEST} s after a worker was killed"
        return None if status == 0 else f"was not started again: {_last_line(attempt.log.read_text())}"
    ends = target in ("raylet", "controller") or target.startswith("rank")
    if ends and attempt.wait(HANG_SECONDS) is None:
        return f"still there {HANG_SECONDS} s after a {target} was killed"
    return None


def _resumed_from(said: str) -> int | None:
    """The step that a log names; None: it was cut off before."""
    found = re.search(r"Resumed from .* after step (\d+) of", said)
    return int(found[1]) if found else 0 if "starting from step 0" in said else None


def _ends(attempt: Attempt) -> bool:
    """Whether all its processes end, also those that a dead launcher left behind."""
    end = time.time() + HANG_SECONDS
    while time.time() < end:
        if not attempt.members():
            return True
        time.sleep(0.2)
    return False


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
