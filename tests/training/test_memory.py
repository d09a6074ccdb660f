"""What training keeps in memory beside the model."""

import pytest
from tiny import train

from pipa_openrlhf.distributed.strategy import Strategy


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradient_bucket_is_as_large_as_what_is_trained(small_run, monkeypatch, stage):
    """DeepSpeed allocates all of it at the first gradient, under LoRA nearly all of it for nothing."""
    engines = []
    initialise = Strategy._ds_init_train_model

    def kept(self, model, cfg):
        result = initialise(self, model, cfg)
        engines.append(result[0].model)
        return result

    monkeypatch.setattr(Strategy, "_ds_init_train_model", kept)
    train("train_pipa", *small_run("run", **{"ds.lora.rank": 4, "ds.zero_stage": stage, "train.max_epochs": 1}))
    (engine,) = engines
    trained = [one for one in engine.module.parameters() if one.requires_grad]
    numbers = sum(getattr(one, "ds_numel", one.numel()) for one in trained)
    assert engine.optimizer.reduce_bucket_size == numbers > 0
