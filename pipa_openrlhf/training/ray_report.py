"""A run's progress, told to Ray from inside its workers."""

import time

import ray.train
import torch

from pipa_openrlhf.distributed.strategy import device
from pipa_openrlhf.training.trainer import Callback

# Ray takes one report at a time and looks for it every two seconds: more would keep training waiting.
_SECONDS = 5.0


class ReportToRay(Callback):
    """Reports rank 0's metrics of the last step, and of one every few seconds."""

    def __init__(self):
        self._last = time.monotonic()

    def on_step_end(self, trainer, row: dict) -> None:
        """Ray waits for a report of every rank: rank 0's clock decides for all of them."""
        is_due = time.monotonic() - self._last >= _SECONDS and trainer.strategy.is_rank_0()
        due = trainer.strategy.all_reduce(torch.tensor(float(is_due), device=device()), op="max")
        if due or row["step"] == trainer.total_steps:
            ray.train.report({**row, "total_steps": trainer.total_steps})
            self._last = time.monotonic()
