"""The ways in which a user starts a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import read_jsonl, train


def test_deepspeed_launcher_with_two_ranks_equals_one_process(small_run, tmp_path):
    changes = {"ds.zero_stage": 2, "train.max_epochs": 1, "ckpt.save_steps": None}
    launcher = Path(sys.executable).parent / "deepspeed"
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    # The launcher starts `python` from the search path.
    environment.update(PATH=f"{launcher.parent}:{environment['PATH']}", OMP_NUM_THREADS="1")
    port = str(20000 + os.getpid() % 20000)
    result = subprocess.run(
        [launcher, "--num_gpus", "2", "--master_port", port, "--module", "pipa_openrlhf.cli.train_pipa"]
        + small_run("launched", **changes),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    launched = read_jsonl(tmp_path / "launched" / "metrics.jsonl")
    alone = train("train_pipa", *small_run("alone", **changes))
    for name in ("loss", "grad_norm", "logratio/chosen"):
        assert [row[name] for row in launched] == pytest.approx([row[name] for row in alone], rel=1e-4)
    assert "--local_rank" not in (tmp_path / "launched" / "README.md").read_text()
