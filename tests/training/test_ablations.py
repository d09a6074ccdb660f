"""Settings of the paper's ablations, end to end: trained priors (Table 3), a fixed value (Table 2), the step threshold
(section 3.3.2) and the SFT model as an adapter."""

import json
import math

import numpy as np
import pytest
from reference import EOS, ids, mean, pipa_loss, token_log_probs
from tiny import flags, train, write_jsonl

ROWS = [
    {"prompt": "1+1?\n", "completion": "so 2", "label": True},
    {"prompt": "1+1?\n", "completion": "it is 3", "label": False},
    {"prompt": "Q ", "completion": "hm", "label": False},
    {"prompt": "What is your name?", "completion": "I am Bo", "label": True},
]


@pytest.fixture
def run_flags(tiny_models, tmp_path):
    def make(output, rows=ROWS, **changes) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "data.dataset": write_jsonl(tmp_path / f"{output}.jsonl", rows),
                "ds.param_dtype": "fp32",
                "train.batch_size": 4,
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make


def expected(policy, prior, variant, value=0.5) -> float:
    u = math.log(value / (1 - value))
    sequences = []
    for row in ROWS:
        prompt, response = ids(row["prompt"]), ids(row["completion"]) + [EOS]
        log_f, log_p = (token_log_probs(folder, prompt, response) for folder in (policy, prior))
        sequences.append((log_f, log_p, np.full(len(response), u), [int(row["label"])] * len(response)))
    return pipa_loss(variant, "sum", sequences)


@pytest.mark.parametrize("variant, keep", [("m", "all"), ("n", "negative")])
def test_a_prior_trained_on_all_or_on_wrong_answers(tiny_models, run_flags, tmp_path, variant, keep):
    sft = train("train_sft", *run_flags("prior", **{"data.keep": keep, "train.max_epochs": 3, "adam.lr": 1e-2}))
    kept = [row for row in ROWS if keep == "all" or not row["label"]]
    tokens = [
        -log_f
        for row in kept
        for log_f in token_log_probs(tiny_models / "policy", ids(row["prompt"]), ids(row["completion"]) + [EOS])
    ]
    assert sft[0]["loss"] == pytest.approx(mean(tokens), rel=1e-4)
    assert len(sft) == 3 and sft[-1]["loss"] < sft[0]["loss"] - 0.1
    changes = {
        "prior.model_name_or_path": tmp_path / "prior",
        "prior.cache_dir": tmp_path / "cache",
        "pipa.variant": variant,
    }
    [row] = train("train_pipa", *run_flags("aligned", **changes))
    by_hand = expected(tiny_models / "policy", tmp_path / "prior", variant)
    assert row["loss"] == pytest.approx(by_hand, rel=1e-4)
    assert abs(row["rewards/rejected"]) > 0.1  # the prior is not the policy's start


@pytest.mark.parametrize("variant", ["m", "n"])
@pytest.mark.parametrize("value", [0.5, 0.2])
def test_a_fixed_value(tiny_models, run_flags, tmp_path, variant, value):
    changes = {
        "prior.model_name_or_path": tiny_models / "prior",
        "prior.cache_dir": tmp_path / "cache",
        "pipa.variant": variant,
        "pipa.fixed_value": value,
        "train.max_epochs": 2,
    }
    rows = train("train_pipa", *run_flags("run", **changes))
    by_hand = expected(tiny_models / "policy", tiny_models / "prior", variant, value)
    assert rows[0]["loss"] == pytest.approx(by_hand, rel=1e-4)
    likelihoods = [value if row["label"] else 1 - value for row in ROWS]
    for row in rows:  # it does not learn
        assert row["pipa/value_likelihood"] == pytest.approx(mean(likelihoods), rel=1e-5)
    assert not list((tmp_path / "run").glob("value_head*"))


@pytest.mark.parametrize("threshold, right_steps", [(-1.0, 3), (0.0, 1), (0.5, 1), (0.9, 0)])
def test_the_step_threshold_decides_which_steps_of_a_wrong_answer_are_right(
    run_flags, tmp_path, threshold, right_steps
):
    """Step-KTO per_step at step 0: every term is 1/2 whatever its label, so labels are read off the SFT term."""
    path = [{"step": "ab", "Q": 0.5}, {"step": "cd", "Q": -0.5}, {"step": "ef", "Q": -1}]
    rows = [{"instruction": "Q", "output": json.dumps(path)}]
    changes = {
        "data.annotation": "step",
        "data.step_threshold": threshold,
        "prior.cache_dir": tmp_path / "cache",
        "kto.step_loss": "per_step",
        "kto.sft_coef": 1.0,
    }
    [row] = train("train_kto", *run_flags("run", rows, **changes))
    prompt, response = ids("<question> Q </question>\n"), ids("ab\ncd\nef") + [EOS]
    log_f = token_log_probs(run_flags("x")[1], prompt, response)
    sft = -mean(log_f[: 3 * right_steps]) if right_steps else 0.0
    assert row["loss"] == pytest.approx(3 * 0.5 + sft, rel=1e-4)
