"""Worker processes that collate: the same run, and no file descriptor a tensor."""

import signal
import sys

import numpy as np
import pytest
from tiny import read_jsonl, run_module, train, write_jsonl

from pipa_openrlhf.data.training_set import load_steps

MANY = {"train.micro_batch_size": 1, "train.batch_size": 32, "train.max_epochs": 1, "train.group_by_length": "false"}


def test_workers_need_few_file_descriptors(small_run, tmp_path, monkeypatch):
    """32 micro-batches a step hold some 300 tensors; with one descriptor each, 256 would not do."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}", "label": n % 2 == 0} for n in range(64)]
    data = {"data.dataset": write_jsonl(tmp_path / "many.jsonl", rows), "data.annotation": None}
    changes = {**MANY, **data, "ckpt.save_steps": None}
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/bash\nulimit -n 256\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    result = run_module("train_pipa", *small_run("out", **changes, **{"data.dataloader_num_workers": 2}))
    assert result.returncode == 0, result.stderr[-2000:]
    with_workers = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    alone = train("train_pipa", *small_run("alone", **changes))
    assert [row["loss"] for row in with_workers] == pytest.approx([row["loss"] for row in alone], rel=1e-5)


class WhatATermDoes:
    """In place of micro-batches."""

    def step(self, _batch):
        return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_signal_that_reaches_every_process_leaves_the_trainer_its_workers():
    assert list(load_steps([np.zeros(1)], WhatATermDoes(), num_workers=1)) == [True]
    assert list(load_steps([np.zeros(1)], WhatATermDoes(), num_workers=0)) == [False]
