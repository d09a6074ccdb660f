"""At step 0 the policy is its own prior: the loss that theory gives, and a line where it is not."""

import importlib
import math

import numpy as np
import pytest
from tiny import train, write_jsonl

from pipa_openrlhf.prior.cache import PriorCache

LINE = "At step 0 the policy is not its own prior"
ROWS = [
    {"prompt": f"{n // 2}?\n", "completion": "answer " * (n % 3 + 1), "label": n % 2 == 0, "problem_id": n // 2}
    for n in range(8)
]
MODULES = {
    "PIPA-M": ("train_pipa", {"pipa.variant": "m", "pipa.loss_reduction": "token_mean"}, math.log(2)),
    "PIPA-N": ("train_pipa", {"pipa.variant": "n", "pipa.loss_reduction": "token_mean"}, math.log(2)),
    "DPO": ("train_dpo", {"pipa.variant": None, "data.pairing": "match", "train.batch_size": 2}, math.log(2)),
    "KTO": ("train_kto", {"pipa.variant": None}, 0.5),
}


@pytest.fixture
def first_row(small_run, tmp_path):
    data = write_jsonl(tmp_path / "answers.jsonl", ROWS)

    def run(objective: str, **changes) -> dict:
        module, flags, _ = MODULES[objective]
        base = {
            "prior.model_name_or_path": None,
            "data.dataset": data,
            "data.annotation": None,
            "ckpt.save_steps": None,
        }
        return train(module, *small_run("out", **{**base, **flags, "train.max_epochs": 1, **changes}))[0]

    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", MODULES)
def test_the_first_loss_is_what_theory_says(first_row, capsys, objective, dtype):
    row = first_row(objective, **{"ds.param_dtype": dtype})
    assert row["loss"] == pytest.approx(MODULES[objective][2], abs=1e-5 if dtype == "fp32" else 0.02)
    assert LINE not in capsys.readouterr().out


@pytest.mark.parametrize("objective", MODULES)
def test_log_probs_that_are_not_the_policys_are_noticed(first_row, capsys, monkeypatch, objective):
    log_probs = PriorCache.log_probs
    noise = np.random.default_rng(0)

    def another_models(self, sample):
        values = log_probs(self, sample)
        return values + noise.normal(0, 0.5, len(values)).astype(np.float32)

    monkeypatch.setattr(PriorCache, "log_probs", another_models)
    row = first_row(objective)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if LINE in line]
    assert f"should be {MODULES[objective][2]:.6g}" in line and f"{row['loss']:.6g}" in line and "dropout" in line


def test_another_prior_is_no_mistake(first_row, capsys, tiny_models):
    first_row("PIPA-N", **{"prior.model_name_or_path": tiny_models / "prior"})
    assert LINE not in capsys.readouterr().out


@pytest.mark.parametrize("objective, place", [("PIPA-N", "pipa.pipa_n_token_loss"), ("DPO", "dpo.dpo_loss")])
def test_a_wrong_loss_ends_the_run_at_its_first_step(first_row, monkeypatch, objective, place):
    """Another factor in front of every term: the log-probs are right, and nothing else would notice."""
    module, _, name = place.partition(".")
    module = importlib.import_module(f"pipa_openrlhf.objectives.{module}")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *values, **settings: 1.0001 * right(*values, **settings))
    with pytest.raises(RuntimeError, match=r"where the policy is its prior the loss must be 0\.693"):
        first_row(objective)
