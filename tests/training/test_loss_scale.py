"""The loss scale of float16 in a checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from cut_runs import cut
from deepspeed.runtime.fp16 import loss_scaler
from tiny import train

from pipa_openrlhf.training.engine_state import EngineState


class _Engine:
    """What EngineState asks of a float16 engine, which no CPU runs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_optimization_stage(self) -> int:
        return 3


def _zero_scaler():
    return SimpleNamespace(
        loss_scaler=loss_scaler.DynamicLossScaler(
            init_scale=2**16, scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
    )


def _plain_scaler():
    return SimpleNamespace(loss_scale_config=loss_scaler.LossScaleConfig(torch.float16, True, 1.0, None))


@pytest.mark.parametrize("make", [_zero_scaler, _plain_scaler], ids=["ZeRO", "no ZeRO"])
def test_float16_goes_on_with_its_loss_scale(make, monkeypatch):
    """Through JSON, as in a checkpoint; then both take the same steps, with and without an overflow."""
    before, after = make(), make()
    scaler, restored = (next(iter(vars(one).values())) for one in (before, after))
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 512.0, 41, 38
    if make is _zero_scaler:
        scaler.cur_hysteresis = 1
    EngineState(_Engine(after)).loss_scale = json.loads(json.dumps(EngineState(_Engine(before)).loss_scale))
    assert vars(restored) == vars(scaler)
    if make is _zero_scaler:
        monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 0))
        for overflow in (False, False, False, True, False):
            for one in (scaler, restored):
                one.update_scale(overflow)
            assert vars(restored) == vars(scaler)
        assert scaler.cur_scale != 512.0


def test_checkpoint_keeps_the_loss_scale_and_gives_it_back(small_run, tmp_path, monkeypatch):
    kept, restored = {"cur_scale": 8.0, "cur_iter": 3}, []
    monkeypatch.setattr(EngineState, "loss_scale", property(lambda self: kept, lambda self, to: restored.append(to)))
    train("train_pipa", *small_run("whole"))
    assert restored == []
    cut(tmp_path / "whole", tmp_path / "cut", 2)
    train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    assert restored == [kept]
