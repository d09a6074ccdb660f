"""Stages of an experiment: commands that are run once, in the order of their needs, in one process or a few."""

import contextlib
import glob
import hashlib
import importlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any, get_type_hints

from pipa_openrlhf.cli import entry
from pipa_openrlhf.errors import UserError

CLI = "pipa_openrlhf.cli."
_NAMED = re.compile(r"\{([^{}]+)\}")
_LINES_SHOWN = 12  # of the log of a stage that failed


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of its output in the work folder.
        module: with a ``main(config)``.
        output: the flag that gets the output.
        flags: the others; True is a bare switch.
        needs: names of stages, whose outputs ``flags`` name by ``{name}``.
        output_file: what is added to the name where the output is a file.
        proof: a file in the output that is there only once the command is through: a signal may end it before.
        goes_on: the command itself goes on with what it left unfinished.
    """

    name: str
    module: str
    output: str
    flags: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    output_file: str = ""
    proof: str = ""
    goes_on: bool = False

    def argv(self, paths: dict[str, str]) -> list[str]:
        """Words of the command line; ``paths`` are of the outputs by name of stage."""
        words = [f"--{self.output}", paths[self.name]]
        for name, value in self.flags.items():
            words.append(f"--{name}")
            if value is not True:
                words.append(
                    _NAMED.sub(lambda found: paths[found[1]], value) if isinstance(value, _Path) else str(value)
                )
        return words


class _Path(str):
    """A flag's value that names outputs of stages."""


def path(text: str) -> str:
    """``"{base}"``: the output of the stage ``base``; ``"{problems}/test.jsonl"``: a file in it."""
    return _Path(text)


class Runner:
    """Runs stages whose marker is missing, or is that of another command.

    A marker, ``done/NAME.json``, holds the command, its seconds, and a digest of the command and of all that it needs.
    """

    def __init__(self, work: str, workers: int = 1, say: Callable[[str], None] = print):
        self.work, self.workers, self.say = work, workers, say
        self._paths: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def path(self, name: str) -> str:
        """Of a stage's output."""
        return self._paths[name]

    def run(self, stages: Iterable[Stage]) -> None:
        """Run what is not done.

        Raises:
            UserError: a stage failed, or needs one that was not given before it; what runs beside it ends first.
        """
        pending = [stage for stage in stages if not self._is_done(stage)]
        if not pending:
            return
        self.say(f"{len(pending)} stages to run, {self.workers} at a time")
        with self._executor() as executor:
            self._run_all(pending, executor)

    def _is_done(self, stage: Stage) -> bool:
        missing = [name for name in stage.needs if name not in self._digests]
        if missing:
            raise UserError(f"stage {stage.name} needs {missing[0]}, which no stage before it makes")
        self._paths[stage.name] = os.path.join(self.work, stage.name + stage.output_file)
        # Without the work folder, which may be moved.
        argv = stage.argv({name: os.path.relpath(one, self.work) for name, one in self._paths.items()})
        content = json.dumps([stage.module, argv, [self._digests[name] for name in stage.needs]])
        self._digests[stage.name] = hashlib.sha256(content.encode()).hexdigest()
        with contextlib.suppress(OSError, ValueError), open(self._marker(stage.name), encoding="utf-8") as file:
            return json.load(file)["digest"] == self._digests[stage.name]
        return False

    def _run_all(self, pending: list[Stage], executor: Executor | None) -> None:
        total, failed = len(pending), ""
        running: dict[Future, Stage] = {}
        waiting = {stage.name: stage for stage in pending}
        unfinished = set(waiting)
        while waiting or running:
            ready = [one for one in waiting.values() if not unfinished.intersection(one.needs)]
            for stage in ready[: 0 if failed else self.workers - len(running)]:
                del waiting[stage.name]
                running[self._start(stage, executor)] = stage
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(done)
                seconds, failure = done.result()
                if not failure and not os.path.exists(os.path.join(self._paths[stage.name], stage.proof).rstrip("/")):
                    failure = "stopped before its end: run it again"
                if failure:
                    failed = failed or f"stage {stage.name} failed, see {self._log(stage.name)}:\n{failure}"
                    continue
                self._mark(stage, seconds)
                unfinished.remove(stage.name)
                self.say(f"[{total - len(unfinished)}/{total}] {stage.name}: {seconds:.1f} s")
        if failed:
            raise UserError(failed)

    def _executor(self) -> contextlib.AbstractContextManager:
        if self.workers == 1:
            return contextlib.nullcontext()
        return ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_end_with_parent)

    def _start(self, stage: Stage, executor: Executor | None) -> Future:
        output = self._paths[stage.name]
        if os.path.exists(self._marker(stage.name)) or not stage.goes_on:
            for old in (output, *glob.glob(f"{glob.escape(output)}.*")):  # and what a command keeps beside its file
                _delete(old)
            _delete(self._marker(stage.name))
        words = (stage.module, stage.argv(self._paths), self._log(stage.name))
        if executor is not None:
            return executor.submit(run_logged, *words)
        future: Future = Future()
        future.set_result(run_logged(*words))
        return future

    def _mark(self, stage: Stage, seconds: float) -> None:
        marker = self._marker(stage.name)
        os.makedirs(os.path.dirname(marker), exist_ok=True)
        content = {
            "digest": self._digests[stage.name],
            "seconds": round(seconds, 2),
            "command": ["python", "-m", stage.module, *stage.argv(self._paths)],
        }
        with open(f"{marker}.unfinished", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(f"{marker}.unfinished", marker)

    def _marker(self, name: str) -> str:
        return os.path.join(self.work, "done", f"{name}.json")

    def _log(self, name: str) -> str:
        return os.path.join(self.work, "logs", f"{name}.log")


def _end_with_parent() -> None:
    """Workers of a process that was killed would wait for its next stage for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _delete(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def run_logged(module: str, argv: list[str], log: str) -> tuple[float, str]:
    """Run a module in this process, its output in a file. Returns its seconds, and its last lines where it failed."""
    import torch

    # Two processes of several threads each on a small machine wait for each other.
    torch.set_num_threads(1)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = run_module(module, argv)
    if status == 0:
        return time.monotonic() - started, ""
    with open(log, encoding="utf-8") as file:
        return 0.0, "".join(file.readlines()[-_LINES_SHOWN:]) or f"exit status {status}"


def run_module(module: str, argv: list[str]) -> int:
    """Exit status of ``python -m module argv``, in this process."""
    main = importlib.import_module(module).main
    # A command of the package has its flags by its name, a script of a recipe by the config of its main().
    flags = module.removeprefix(CLI) if module.startswith(CLI) else get_type_hints(main)["config"]
    return entry.run(main, flags, argv)
