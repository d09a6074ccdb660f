"""Gradients of many micro-batches add up in float32, also where the model is bf16."""

from dataclasses import asdict

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from tiny import run_in_process
from torch import nn

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.distributed.upstream import Actor

NUMBER = 512
INPUTS = torch.randn(NUMBER, 1, 32, generator=torch.Generator().manual_seed(0)).abs().bfloat16()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 4, bias=False, dtype=torch.bfloat16)


def exact_sum() -> torch.Tensor:
    """Float64 sum of the bf16 gradients of all micro-batches."""
    model, total = linear(), torch.zeros(4, 32, dtype=torch.float64)
    for one in INPUTS:
        model.weight.grad = None
        model(one).float().sum().backward()
        total += model.weight.grad.double()
    return total


def relative_error(stage: int, *flags: str) -> float:
    """Of what the optimizer is given after 512 micro-batches, in the second of two global batches."""
    args = parse("train_sft", ["--ds.zero_stage", str(stage), "--adam.lr", "0", "--max_norm", "0", *flags])
    strategy = Strategy(args)
    strategy.setup_distributed()
    optimizer = {
        "optim": "adam",
        "muon": asdict(args.muon),
        "adam": asdict(args.adam),
        "lr_scheduler": "constant",
        "lr_warmup_ratio": 0,
        "min_lr_ratio": 1,
        "max_norm": args.max_norm,
        "scheduler_steps": 2,
    }
    actor, _, _ = strategy.prepare((Actor(linear()), optimizer))
    for _ in range(2):
        for number, one in enumerate(INPUTS, start=1):
            strategy.backward(actor.model(one).float().sum(), actor, is_last=number == NUMBER)
        parameter = actor.model.module.weight
        gradient = (safe_get_full_grad(parameter) if stage else parameter.grad).double().clone()
        actor.model.step()
    expected = exact_sum()
    return float((gradient - expected).norm() / expected.norm())


@pytest.mark.parametrize("flags", [[], ["--ds.grad_accum_dtype", "fp32"]], ids=["default", "fp32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float32_is_the_default_under_zero(stage, flags):
    assert relative_error(stage, *flags) < 1e-6


@pytest.mark.parametrize("stage, flags", [(0, []), (2, ["--ds.grad_accum_dtype", "bf16"])])
def test_bf16_sums_lose_percents(stage, flags):
    """The error that float32 sums avoid, where DeepSpeed cannot or the user does not want to."""
    assert relative_error(stage, *flags) > 0.01


@pytest.mark.parametrize("stage, said", [(0, True), (2, False)])
def test_a_line_says_where_gradients_add_up_in_bf16(small_run, capsys, stage, said):
    changes = {"prior.model_name_or_path": None, "prior.cache_dir": None, "pipa.variant": None}
    words = small_run("out", **changes, **{"ds.param_dtype": "bf16", "ds.zero_stage": stage, "train.max_epochs": 1})
    assert run_in_process("train_sft", *words) == 0
    assert ("add up in bf16" in capsys.readouterr().out) == said


@pytest.mark.parametrize("stage", [1, 2])
def test_such_runs_resume_where_they_stopped(small_run, tmp_path, stage):
    """ZeRO-1 with float32 gradients once stopped at its first checkpoint."""
    changes = {"ds.param_dtype": "bf16", "ds.zero_stage": stage, "ds.grad_accum_dtype": "fp32"}
    assert run_in_process("train_pipa", *small_run("out", **changes, **{"train.max_epochs": 1})) == 0
    longer = {**changes, "train.max_epochs": 2, "ckpt.load_enable": True}
    assert run_in_process("train_pipa", *small_run("out", **longer)) == 0
