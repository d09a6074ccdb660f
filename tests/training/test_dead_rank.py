"""A rank that dies takes the job with it, at once, and the last lines say what was first."""

import os
import signal
import time

import psutil
import pytest
from test_launchers import start_launcher
from tiny import start_module


def rank_1_of(launcher: int) -> psutil.Process | None:
    """The process that trains as the second rank."""
    for one in psutil.Process(launcher).children(recursive=True):
        try:
            if one.environ().get("RANK") == "1":
                return one
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_killed_rank_ends_the_job_with_its_cause(small_run, tmp_path, launcher):
    """Rank 0 waits in a collective for the one that was killed."""
    words = small_run("out", **{"train.max_epochs": 4000, "ckpt.save_steps": 1000, "ds.zero_stage": 3})
    process = start_launcher(2, words) if launcher == "deepspeed" else start_module("train_pipa", *words, ranks=2)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    killed = rank_1_of(process.pid)
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped because another rank did (rank 0 on " in (errors or output)
    assert "[rank0]" not in (errors or output), "no traceback of the one that only waited"
    lines = (errors or output).strip().splitlines()
    if launcher == "deepspeed":
        assert lines[-1].endswith("exits with return code = -9")
    else:
        assert f"Signal 9 (SIGKILL) received by PID {killed.pid}" in lines[-2]
