"""Each optimisation on and off by its flag, on the same batches: the same losses, and less work."""

import pytest
from safetensors.torch import load_file
from tiny import read_jsonl, train, write_jsonl

from pipa_openrlhf.model.policy import Policy, ValueHead

# Four prompts of three answers, not side by side; right and wrong ones for each.
ROWS = [
    {"prompt": f"{'how many ' * (n % 4)}{n % 4}?\n", "completion": "so " * (n % 5) + f"{n}", "label": n < 8}
    for n in range(12)
]
# As many answers in a batch as there are: batches are the same whatever groups them.
FIXED = {"train.batch_size": 12, "train.micro_batch_size": 6, "data.annotation": None, "train.max_epochs": 4}
MODULES = {
    "PIPA-M": ("train_pipa", {"pipa.variant": "m", "prior.model_name_or_path": None, "adam.lr": 1e-4}),
    "PIPA-N": ("train_pipa", {}),
    "SFT": ("train_sft", {"pipa.variant": None, "prior.model_name_or_path": None, "prior.cache_dir": None}),
    "DPO": ("train_dpo", {"pipa.variant": None, "data.pairing": "match", "train.batch_size": 4}),
    "KTO": ("train_kto", {"pipa.variant": None}),
}


@pytest.fixture
def losses(small_run, two_ranks, tmp_path):
    """``losses(objective, **flags)`` -> loss of every step."""
    numbers = iter(range(99))
    data = write_jsonl(tmp_path / "answers.jsonl", ROWS)

    def make(objective: str, on_two: bool = False, **changes) -> list[float]:
        name = f"run{next(numbers)}"
        module, flags = MODULES[objective]
        changes = {"data.dataset": data, "ckpt.save_steps": None, "adam.lr": 1e-3, **FIXED, **flags, **changes}
        words = small_run(name, **changes)
        if on_two:
            result = two_ranks(module, *words)
            assert result.returncode == 0, result.stderr[-3000:]
            rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        else:
            rows = train(module, *words)
        return [row["loss"] for row in rows]

    return make


@pytest.fixture
def tokens_run(monkeypatch):
    """List that gets the number of tokens of every forward pass."""
    seen = []
    forward = Policy.forward

    def counted(self, batch, *rest, **options):
        seen.append(batch.input_ids.numel())
        return forward(self, batch, *rest, **options)

    monkeypatch.setattr(Policy, "forward", counted)
    return seen


SWITCHES = {
    "train.fused_head": "false",
    "train.group_by_length": "false",
    "train.share_prefixes": "false",
    "ds.packing_samples": True,
}


@pytest.mark.parametrize("objective", MODULES)
@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_every_switch_leaves_the_losses_alone(losses, objective, lora):
    base = {"ds.lora.rank": lora, "train.group_by_length": "true"}
    expected = losses(objective, **base)
    assert len(set(expected)) >= 3, "it trains"
    for flag, value in SWITCHES.items():
        if objective == "DPO" and flag == "train.group_by_length":
            continue  # batches are not the whole data here
        assert losses(objective, **{**base, flag: value}) == pytest.approx(expected, rel=1e-5, abs=1e-5), flag


@pytest.mark.parametrize("objective", MODULES)
def test_every_switch_leaves_the_losses_alone_up_to_bf16_noise(losses, objective):
    base = {"ds.param_dtype": "bf16", "ds.zero_stage": 2, "train.group_by_length": "true"}
    expected = losses(objective, **base)
    for flag, value in SWITCHES.items():
        if objective == "DPO" and flag == "train.group_by_length":
            continue
        assert losses(objective, **{**base, flag: value}) == pytest.approx(expected, rel=0.02, abs=0.02), flag


@pytest.mark.parametrize("objective", MODULES)
def test_sharing_runs_fewer_tokens_in_every_pass(losses, tokens_run, objective, tmp_path):
    """The prior pass, KTO's mismatched completions and training itself."""
    counts = []
    for share in ("false", "true"):
        tokens_run.clear()
        cache = None if objective == "SFT" else tmp_path / f"cache_{share}"
        losses(objective, **{"train.share_prefixes": share, "prior.cache_dir": cache})
        counts.append(list(tokens_run))
    assert sum(counts[1]) < 0.9 * sum(counts[0])


def test_the_value_head_works_in_training_only(losses, monkeypatch):
    """The prior needs no value: a run that fills the cache calls the head as often as one that finds it full."""
    calls = []
    forward = ValueHead.forward
    monkeypatch.setattr(ValueHead, "forward", lambda self, hidden: calls.append(1) or forward(self, hidden))
    counts = []
    for _ in range(2):
        calls.clear()
        losses("PIPA-N", **{"train.max_epochs": 1, "prior.model_name_or_path": None})
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_sharing_on_two_ranks(losses, stage):
    expected = losses("PIPA-N", **{"train.share_prefixes": "false"})
    shared = losses("PIPA-N", on_two=True, **{"ds.zero_stage": stage, "train.micro_batch_size": 3})
    assert shared == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_prior_has_the_same_log_probs_with_and_without_sharing(losses, tmp_path):
    entries = []
    for share in ("false", "true"):
        cache = tmp_path / f"cache_{share}"
        losses("KTO", **{"train.share_prefixes": share, "prior.cache_dir": cache, "train.max_epochs": 1})
        shards = [load_file(path) for path in cache.rglob("*.safetensors")]
        entry = {}
        for shard in shards:
            keys, starts = shard["keys"].view(-1, 16), shard["starts"].tolist()
            for key, start, end in zip(keys, starts, starts[1:]):
                entry[bytes(key.tolist())] = shard["log_probs"][start:end].tolist()
        entries.append(entry)
    assert entries[0].keys() == entries[1].keys() and len(entries[0]) >= 20
    for key, values in entries[0].items():
        assert entries[1][key] == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_a_model_that_cannot_share_says_so_and_trains(losses, capsys):
    with_sharing = losses("PIPA-N", **{"ds.attn_implementation": "eager"})
    assert "--train.share_prefixes" in capsys.readouterr().out
    assert with_sharing == pytest.approx(losses("PIPA-N"), rel=1e-5, abs=1e-5)


def test_sharing_does_not_decide_which_answers_share_a_batch(losses):
    """Batches of 4 of 12 answers: other batches would give other losses from the second step on."""
    small = {"train.batch_size": 4, "train.micro_batch_size": 4}
    expected = losses("PIPA-N", **small)
    assert losses("PIPA-N", **{**small, "train.share_prefixes": "false"}) == pytest.approx(expected, rel=1e-5)
    assert losses("PIPA-N", **{**small, "ds.packing_samples": True}) == pytest.approx(expected, rel=1e-5)
    assert losses("PIPA-N", **{**small, "train.group_by_length": "false"})[1:] != pytest.approx(expected[1:], rel=1e-3)
