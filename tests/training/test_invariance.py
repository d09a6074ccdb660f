"""Losses, gradient norms and weights do not depend on how a run is cut into micro-batches, ranks and stages."""

import numpy as np
import pytest
import torch
from openrlhf.utils.distributed_sampler import DistributedSampler
from safetensors.torch import load_file
from tiny import read_jsonl, train, write_jsonl

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.plan import global_batches

ONE_AT_A_TIME = {"train.micro_batch_size": 1}
ALTOGETHER = {"train.micro_batch_size": 4}
PACKED = {"train.micro_batch_size": 4, "ds.packing_samples": True}
CHECKPOINTING = {"model.gradient_checkpointing_enable": True}
TWO_PASSES = {"train.fused_head": "false"}
REENTRANT = {**CHECKPOINTING, "model.gradient_checkpointing_reentrant": True}
LORA = {"ds.lora.rank": 4}
FEW_TOKENS = {"train.max_tokens_per_micro_batch": 13}


def outcome(folder) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics and final weights of a run."""
    weights = {}
    for name in ("adapter_model.safetensors", "model.safetensors", "value_head.safetensors"):
        if (folder / name).exists():
            weights.update(load_file(folder / name))
    return read_jsonl(folder / "metrics.jsonl"), weights


def assert_same(first, second, rel=1e-5, abs=2e-5) -> None:
    rows, weights = first
    other_rows, other_weights = second
    assert len(rows) == len(other_rows) > 0
    for row, other in zip(rows, other_rows):
        assert row.keys() == other.keys()
        for name in row.keys() - {"tokens_per_second"}:
            same = other[name] is None if row[name] is None else other[name] == pytest.approx(row[name], rel, 1e-5)
            assert same, (row["step"], name, row[name], other[name])
    assert weights.keys() == other_weights.keys() and len(weights) > 2
    for name in weights:
        assert torch.allclose(weights[name], other_weights[name], rtol=1e-4, atol=abs), name


@pytest.fixture
def one_run(small_run, two_ranks, tmp_path):
    """``one_run({"flag": value})`` -> metrics and weights of a run of three steps, the last batch partial."""
    numbers = iter(range(99))

    def make(changes: dict, on_two: bool = False):
        name = f"run{next(numbers)}"
        words = small_run(name, **{"train.max_epochs": 1, "ckpt.save_steps": None, "adam.lr": 1e-3, **changes})
        if on_two:
            result = two_ranks("train_pipa", *words)
            assert result.returncode == 0, result.stderr[-3000:]
        else:
            train("train_pipa", *words)
        return outcome(tmp_path / name)

    return make


@pytest.mark.parametrize("base", [{}, LORA], ids=["full", "lora"])
def test_micro_batches_packing_and_recomputation(one_run, base):
    expected = one_run(base)
    assert [row["num_tokens"] > 0 for row in expected[0]] == [True] * 3
    for changes in (
        ONE_AT_A_TIME,
        ALTOGETHER,
        PACKED,
        TWO_PASSES,
        CHECKPOINTING,
        REENTRANT,
        {**PACKED, **CHECKPOINTING},
    ):
        assert_same(expected, one_run({**base, **changes}))


@pytest.fixture
def forward_passes(monkeypatch) -> list[tuple[int, int]]:
    """Sequences and tokens of every forward pass of training and of the prior."""
    seen = []

    def watched(samples, *words, **options):
        batch = collate(samples, *words, **options)
        seen.append((len(samples), batch.input_ids.numel()))
        return batch

    for module in ("data.training_set", "prior.fill"):
        monkeypatch.setattr(f"pipa_openrlhf.{module}.collate", watched)
    return seen


@pytest.mark.parametrize("grouped", ["true", "false"])
@pytest.mark.parametrize("layout", [{"train.share_prefixes": "false"}, {"ds.packing_samples": True}, {}])
def test_micro_batches_of_a_number_of_tokens(one_run, tmp_path, forward_passes, layout, grouped):
    """Fewer than the longest answer has, and enough for all four of a batch, twice as many as by default."""
    base = {**layout, "train.group_by_length": grouped}
    expected = one_run(base)
    for most, sequences in ((FEW_TOKENS["train.max_tokens_per_micro_batch"], {1}), (70, {4, 2})):
        forward_passes.clear()
        changes = {"train.max_tokens_per_micro_batch": most, "prior.cache_dir": tmp_path / f"cache{most}"}
        assert_same(expected, one_run({**base, **changes}))
        assert all(number == 1 or tokens <= most for number, tokens in forward_passes), forward_passes
        assert sequences <= {number for number, _ in forward_passes}, forward_passes


@pytest.mark.parametrize("base", [{}, LORA], ids=["full", "lora"])
def test_stages(one_run, base):
    expected = one_run({**base, "ds.zero_stage": 0})
    for stage in (1, 2, 3):
        assert_same(expected, one_run({**base, "ds.zero_stage": stage}))
    assert_same(expected, one_run({**base, "ds.zero_stage": 3, **PACKED, **CHECKPOINTING}))
    assert_same(expected, one_run({**base, "ds.zero_stage": 3, **TWO_PASSES}))


@pytest.mark.parametrize("reduction", ["sum", "token_mean", "sequence_mean"])
@pytest.mark.parametrize("variant", ["m", "n"])
def test_every_reduction(one_run, variant, reduction):
    # Prior and start are one model, which keeps log F away from the clip.
    base = {
        "pipa.variant": variant,
        "pipa.loss_reduction": reduction,
        "pipa.sft_coef": 0.5,
        "prior.model_name_or_path": None,
        "adam.lr": 1e-4,
    }
    expected = one_run({**base, **ONE_AT_A_TIME})
    assert_same(expected, one_run({**base, **PACKED}))


def test_clipping_and_gradient_norm_are_of_the_whole_batch(one_run):
    """Clipping per micro-batch would pass a test without clipping."""
    base = {"max_norm": 0.1}
    expected = one_run({**base, **ONE_AT_A_TIME})
    assert all(row["grad_norm"] > 1 for row in expected[0])
    assert_same(expected, one_run({**base, **ALTOGETHER}))
    assert_same(expected, one_run({**base, "ds.zero_stage": 2, **ONE_AT_A_TIME}))


@pytest.mark.parametrize("stage, changes", [(0, {}), (1, {}), (2, LORA), (3, PACKED), (2, FEW_TOKENS)])
def test_two_ranks_equal_one(one_run, stage, changes):
    """Batches of 3, 3, 3 and 1 on two ranks: uneven shares, and at the end a rank with nothing to do."""
    base = {"ds.zero_stage": stage, "train.batch_size": 3, **changes}
    plain = {"ds.zero_stage": 0, "ds.packing_samples": None, "train.max_tokens_per_micro_batch": None}
    expected = one_run({**base, **plain})
    assert len(expected[0]) == 4
    assert_same(expected, one_run(base, on_two=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_sum_gradients_in_bf16_too(one_run, stage):
    """Each rank's own gradients would give a norm about 1.6 times as large."""
    base = {"ds.zero_stage": stage, "ds.param_dtype": "bf16", **ONE_AT_A_TIME}
    norms = [[row["grad_norm"] for row in one_run(base, on_two)[0]] for on_two in (False, True)]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_order_and_padding_within_a_batch_do_not_matter(one_run, tmp_path, small_run):
    words = [f"{'long ' * n}?" for n in range(6)]
    rows = [{"prompt": text, "completion": text[::-1], "label": n % 2} for n, text in enumerate(words)]
    results = []
    for name, some in (("forward", rows), ("backward", rows[::-1])):
        data = write_jsonl(tmp_path / f"{name}.jsonl", some)
        changes = {"data.dataset": data, "data.annotation": None, "train.batch_size": 8, "train.micro_batch_size": 8}
        results.append(one_run(changes))
    assert_same(*results)


def test_a_batch_larger_than_the_data_is_one_step(one_run):
    rows, _ = one_run({"train.batch_size": 64, "train.max_epochs": 2})
    assert [row["step"] for row in rows] == [1, 2]


def test_every_answer_is_trained_on_once_an_epoch(one_run):
    """10 answers in batches of 4: the last two are not dropped."""
    rows, _ = one_run({})
    whole, _ = one_run({"train.batch_size": 10})
    assert len(rows) == 3 and rows[-1]["epoch"] == 1
    assert rows[-1]["num_tokens"] == whole[-1]["num_tokens"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_order_is_upstreams(ranks):
    """The union over upstream's ranks of what they run in a step is our global batch."""
    for epoch in (0, 1):
        ours = global_batches(20, 4, seed=7, epoch=epoch)
        theirs = []
        for rank in range(ranks):
            sampler = DistributedSampler(
                range(20), num_replicas=ranks, rank=rank, shuffle=True, seed=7, drop_last=True
            )
            sampler.set_epoch(epoch)
            theirs.append(list(sampler))
        per_rank = 4 // ranks
        for step, batch in enumerate(ours):
            upstream = [index for order in theirs for index in order[step * per_rank : (step + 1) * per_rank]]
            assert sorted(batch) == sorted(upstream)
    assert not np.array_equal(global_batches(20, 4, 7, 0)[0], global_batches(20, 4, 7, 1)[0])
