"""Every objective end to end on two ranks: the same losses, gradient norms and reference points as on one."""

import json

import pytest
from tiny import flags, read_jsonl, train, write_jsonl

# Unequal lengths, two answers to some problems, one to others; five pairs and seven single answers.
PAIRED = [
    {"prompt": f"{n}+{n}?\n", "chosen": ["x" * n, "ok"], "rejected": ["y", "no" * n], "rejected_labels": [n % 2, 0]}
    for n in range(1, 6)
]
SINGLE = [
    {"prompt": f"{n // 2}-{n}?\n", "completions": ["so " * (1 + n % 3), f"{n}"], "labels": [n % 3 > 0, n % 2 > 0]}
    for n in range(7)
]
ONE_PROBLEM = [{**row, "prompt": "Q "} for row in SINGLE[:3]]
STEP = {"data.annotation": "step"}

# name -> module, rows, flags. Three a batch on two ranks with one a micro-batch leave a rank idle in every batch.
RUNS = {
    "pipa_m": ("train_pipa", SINGLE, {**STEP, "pipa.sft_coef": 0.5, "ds.zero_stage": 3}),
    "pipa_n": ("train_pipa", PAIRED, {**STEP, "pipa.variant": "n", "pipa.loss_reduction": "token_mean"}),
    "dpo": ("train_dpo", PAIRED, {"ds.zero_stage": 3, "model.nll_loss_coef": 0.5}),
    "dpo_by_tokens": ("train_dpo", PAIRED, {"train.max_tokens_per_micro_batch": 50}),
    "ipo": ("train_dpo", PAIRED, {"model.ipo_enable": True}),
    "step_dpo_l1": ("train_dpo", PAIRED, STEP),
    "step_dpo_l0": ("train_dpo", PAIRED, {**STEP, "dpo.step_loss": "l0", "train.micro_batch_size": 2}),
    "kto": ("train_kto", SINGLE, {"ds.zero_stage": 3, "kto.sft_coef": 0.5}),
    "step_kto_l1": ("train_kto", SINGLE, {**STEP, "train.micro_batch_size": 2}),
    "kto_by_tokens": ("train_kto", SINGLE, {"train.max_tokens_per_micro_batch": 40}),
    "step_kto_per_step": ("train_kto", PAIRED, {**STEP, "kto.step_loss": "per_step", "ds.lora.rank": 2}),
    "kto_without_mismatches": ("train_kto", ONE_PROBLEM, {"ds.zero_stage": 3}),
}


@pytest.fixture(scope="module")
def two_rank_runs(tiny_models, two_ranks, tmp_path_factory):
    """Run everything on two ranks; return ``make(name, output)``, the module and flags of a run."""
    root = tmp_path_factory.mktemp("two_ranks")

    def make(name, output) -> tuple[str, list[str]]:
        module, rows, changes = RUNS[name]
        values = {
            "model.model_name_or_path": tiny_models / "policy",
            "prior.model_name_or_path": tiny_models / "prior",
            "prior.cache_dir": root / "cache",
            "data.dataset": write_jsonl(root / f"{name}.jsonl", rows),
            "ds.param_dtype": "fp32",
            "train.batch_size": 3,
            "train.micro_batch_size": 1,
            "train.max_epochs": 2,
            "adam.lr": 1e-3,
            "ckpt.output_dir": root / f"{name}_{output}",
            **changes,
        }
        return module, flags(values)

    for name in RUNS:
        module, words = make(name, "two")
        result = two_ranks(module, *words)
        assert result.returncode == 0, result.stderr[-3000:]
    return make, root


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_one(two_rank_runs, name):
    make, root = two_rank_runs
    module, words = make(name, "one")
    one, two = train(module, *words), read_jsonl(root / f"{name}_two" / "metrics.jsonl")
    for expected, got in zip(one, two, strict=True):
        assert got.keys() == expected.keys()
        for metric in ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            value = expected.get(metric)
            assert got.get(metric) == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), metric
    assert json.loads((root / f"{name}_two" / "args.json").read_text())["resolved.finished"]
    weights = "adapter_model.safetensors" if "ds.lora.rank" in RUNS[name][2] else "model.safetensors"
    assert (root / f"{name}_two" / weights).is_file()


def test_the_reference_point_differs_from_zero_somewhere(two_rank_runs):
    """Otherwise the comparison above would not see a rank that counts only its own mismatches."""
    _, root = two_rank_runs
    kl = [row["kl"] for name in ("kto", "step_kto_l1") for row in read_jsonl(root / f"{name}_two" / "metrics.jsonl")]
    assert max(kl) > 0.1
    assert {row["kl"] for row in read_jsonl(root / "kto_without_mismatches_two" / "metrics.jsonl")} == {0.0}
