"""On CPU, ZeRO-3 must not go on before every parameter that it gathers has arrived."""

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.devices import on_cpu
from pipa_openrlhf.distributed.strategy import Strategy


@pytest.mark.skipif(not on_cpu(), reason="a stream keeps the order there")
@pytest.mark.parametrize("of", ["get_ds_train_config", "get_ds_eval_config"])
def test_gathers_are_waited_for_one_by_one(of):
    strategy = Strategy(parse("train_sft", ["--ds.zero_stage", "3"]))
    strategy.world_size = 1
    config = getattr(strategy, of)()
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).allgather_sequential
