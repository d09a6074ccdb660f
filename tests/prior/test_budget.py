"""The prior pass keeps no gradients, so it may take more tokens at once than training."""

import pytest
from tiny import train

from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.prior import fill
from pipa_openrlhf.prior.fill import pass_budget

GIB = 2**30


def test_a_pass_takes_what_a_share_of_the_free_memory_holds_and_no_less_than_training():
    assert pass_budget(4096, None, 300_000) == 4096, "on a CPU as in training"
    assert pass_budget(4096, 20 * GIB, 300_000) == 5 * GIB // 300_000
    assert pass_budget(4096, GIB, 300_000) == 4096
    assert pass_budget(4096, 640 * GIB, 300_000) == 2**15
    assert pass_budget(100_000, 640 * GIB, 300_000) == 100_000


@pytest.mark.parametrize("free, most", [(None, 1), (GIB, 10)])
def test_the_budget_decides_how_many_answers_a_pass_takes(small_run, monkeypatch, free, most):
    sizes = []
    collate = fill.collate
    monkeypatch.setattr(
        fill, "collate", lambda samples, *args, **more: sizes.append(len(samples)) or collate(samples, *args, **more)
    )
    monkeypatch.setattr(Strategy, "least_free_memory", lambda self: free)
    words = {"train.micro_batch_size": 1, "prior.model_name_or_path": None, "train.max_epochs": 1}
    train("train_pipa", *small_run("out", **words, **{"train.share_prefixes": "false"}))
    assert sum(sizes) == 10 and max(sizes) == most
