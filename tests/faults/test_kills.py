"""A real job is killed three times from outside and ends as if nothing had happened; `run.py` does it fifty times."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jobs  # noqa: E402
from killer import Attempt  # noqa: E402
from tiny import run_in_process  # noqa: E402


def kill_when(job: jobs.Job, words: list[str], folder: Path, is_time) -> None:
    """Start a job and SIGKILL it as soon as ``is_time()``."""
    attempt = Attempt(words, folder / "attempt.log", folder / "memory", job)
    while attempt.process.poll() is None and not is_time():
        time.sleep(0.0005)
    os.killpg(attempt.process.pid, signal.SIGKILL)
    assert attempt.process.wait() == -signal.SIGKILL, attempt.log.read_text()[-2000:]


def test_three_kills_of_one_job(tmp_path, monkeypatch):
    """In the prior pass, in a checkpoint, and in the export."""
    inputs, folder, whole = (jobs.fresh(tmp_path / name) for name in ("inputs", "killed", "whole"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    jobs.make_inputs(inputs)
    job = jobs.Job(
        "", "train_pipa", {"ds.lora.rank": 4, "ds.lora.dropout": 0.2, "model.model_name_or_path": "adapter"}
    )
    words = jobs.command(job, inputs, folder, port=0)
    kill_when(job, words, folder, lambda: any((folder / "cache").glob("v1/*")))
    kill_when(job, words, folder, lambda: jobs.steps_done(folder) > 20 and jobs.is_writing(folder, jobs.CHECKPOINT))
    assert 20 < jobs.steps_done(folder) < 40
    kill_when(job, words, folder, lambda: (folder / "out" / "merged_base.unfinished").exists())
    assert jobs.steps_done(folder) == 40 and not jobs.is_finished(folder)
    assert run_in_process("train_pipa", *words[3:]) == 0
    assert run_in_process("train_pipa", *jobs.command(job, inputs, whole, port=0)[3:]) == 0
    assert jobs.difference(job, folder, whole) is None
