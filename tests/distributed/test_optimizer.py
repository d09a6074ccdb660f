"""Every ZeRO stage updates by torch's fused AdamW, in CPU memory too: nothing is compiled at first use."""

from dataclasses import asdict

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.distributed.upstream import Actor
from pipa_openrlhf.errors import UserError


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 4, bias=False)


def expected_weight(inputs: torch.Tensor) -> torch.Tensor:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for one in inputs:
        optimizer.zero_grad()
        model(one).sum().backward()
        optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("offload", [[], ["--ds.adam_offload"]], ids=["", "offload"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_is_torchs_own(stage, offload):
    flags = ["--ds.zero_stage", str(stage), "--adam.lr", "0.01", "--adam.weight_decay", "0.1", "--max_norm", "0"]
    args = parse("train_sft", [*flags, "--ds.param_dtype", "fp32", *offload])
    strategy = Strategy(args)
    strategy.setup_distributed()
    groups = {"optim": "adam", "muon": asdict(args.muon), "adam": asdict(args.adam), "max_norm": args.max_norm}
    schedule = {"lr_scheduler": "constant", "lr_warmup_ratio": 0, "min_lr_ratio": 1, "scheduler_steps": 9}
    actor, optimizer, _ = strategy.prepare((Actor(linear()), {**groups, **schedule}))
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
    inputs = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    for one in inputs:
        strategy.backward(actor.model(one).sum(), actor, is_last=True)
        actor.model.step()
    weight = actor.model.module.weight
    updated = safe_get_full_fp32_param(weight) if stage else weight.detach()
    torch.testing.assert_close(updated, expected_weight(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_float32_sums_in_cpu_memory_need_the_last_stage(tmp_path, stage):
    """DeepSpeed loses the gradient at the first stage, and rounds its sum at the second."""
    words = ["--ds.adam_offload", "--ds.grad_accum_dtype", "fp32", "--ds.zero_stage"]
    with pytest.raises(UserError, match="needs --ds.zero_stage 3$"):
        parse("train_sft", [*words, str(stage)]).ds.check()
    parse("train_sft", [*words, "3"]).ds.check()
    parse("train_sft", [*words, str(stage), "--ds.param_dtype", "fp32"]).ds.check()
