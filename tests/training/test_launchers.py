"""The ways in which a user starts a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import GROUP, read_jsonl, train


def start_launcher(ranks: int, flags: list[str]) -> subprocess.Popen:
    """The real ``deepspeed`` command, in a process group of its own as a terminal would make it."""
    launcher = Path(sys.executable).parent / "deepspeed"
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    # The launcher starts `python` from the search path.
    environment.update(PATH=f"{launcher.parent}:{environment['PATH']}", OMP_NUM_THREADS="1")
    port = str(20000 + os.getpid() % 20000)
    return subprocess.Popen(
        [
            launcher,
            "--num_gpus",
            str(ranks),
            "--master_port",
            port,
            "--module",
            "pipa_openrlhf.cli.train_pipa",
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def test_deepspeed_launcher_with_two_ranks_equals_one_process(small_run, tmp_path):
    changes = {"ds.zero_stage": 2, "train.max_epochs": 1, "ckpt.save_steps": None}
    process = start_launcher(2, small_run("launched", **changes))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    launched = read_jsonl(tmp_path / "launched" / "metrics.jsonl")
    alone = train("train_pipa", *small_run("alone", **changes))
    for name in ("loss", "grad_norm", "logratio/chosen"):
        assert [row[name] for row in launched] == pytest.approx([row[name] for row in alone], rel=1e-4)
    assert "--local_rank" not in (tmp_path / "launched" / "README.md").read_text()


def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(small_run, tmp_path):
    """The terminal sends SIGINT to the launcher and to every rank; the launcher adds a SIGTERM."""
    changes = {"train.max_epochs": 400, "ckpt.save_steps": None}
    process = start_launcher(2, small_run("stopped", **changes))
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    checkpoints = list((tmp_path / "stopped" / "checkpoints").iterdir())
    steps = metrics.read_text().count("\n")
    assert [path.name for path in checkpoints] == [f"global_step{steps}"], output[-2000:]
