"""On CPU, ZeRO-3 must not go on before every parameter that it gathers has arrived."""

import os
import subprocess
import sys

import pytest

from pipa_openrlhf.distributed.strategy import on_cpu

# Every gather arrives as late as it may: when it is waited for.
GATHER_LATE = """
import deepspeed
import torch
from deepspeed import comm

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.strategy import Strategy

gather = comm.all_gather_into_tensor


class Late:
    def __init__(self, target, source, group):
        self.target, self.arrived = target, torch.empty_like(target)
        self.handle = gather(self.arrived, source, group=group, async_op=True)

    def wait(self):
        self.handle.wait()
        self.target.copy_(self.arrived)


def gather_late(target, source, group=None, async_op=False, **_):
    late = Late(target, source, group)
    return late if async_op else late.wait()


strategy = Strategy(parse("train_sft", ["--ds.zero_stage", "3"]))
strategy.setup_distributed()
strategy.setup_distributed()
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
with deepspeed.zero.GatheredParameters(list(layers.parameters()), modifier_rank=0):
    for number, parameter in enumerate(layers.parameters()):
        parameter.data.fill_(number + 1)
comm.all_gather_into_tensor = gather_late
with deepspeed.zero.GatheredParameters(list(layers.parameters())):
    for number, parameter in enumerate(layers.parameters()):
        assert (parameter == number + 1).all(), f"parameter {number} has not arrived"
"""


@pytest.mark.skipif(not on_cpu(), reason="a stream keeps the order there")
def test_every_gather_is_waited_for(tmp_path):
    script = tmp_path / "gather_late.py"
    script.write_text(GATHER_LATE)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
