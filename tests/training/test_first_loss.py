"""The logged loss of real training runs against METHOD's formula, computed by hand in float64."""

import itertools

import numpy as np
import pytest
from reference import pipa_loss, token_log_probs, value_logits
from safetensors.torch import load_file
from tiny import read_jsonl, train, write_jsonl

EOS = 257
# Eight answers to four problems, each right one beside a wrong one.
ANSWERS = [
    ("1+1?\n", ["a=2", "so 2"], [1, 1]),
    ("1+1?\n", ["a=3", "so 3"], [1, 0]),
    ("2+2=\n", ["4"], [1]),
    ("2+2=\n", ["it is", "5"], [1, 0]),
    ("Q ", ["x", "y", "zz"], [1, 1, 1]),
    ("Q ", ["x", "n", "no"], [1, 0, 0]),
    ("name?", ["Bo"], [1]),
    ("name?", ["Al"], [0]),
]


def ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def tokens_of(prompt, steps, labels, annotation, tokenizer):
    """Response token ids and labels by the text rule: separator with the step before it, eos with the last."""
    texts = [step + "\n" for step in steps[:-1]] + [steps[-1]]
    step_ids = [ids(text, tokenizer) for text in texts]
    step_ids[-1] = step_ids[-1] + [EOS]
    labels = labels if annotation == "step" else [labels[-1]] * len(labels)
    return sum(step_ids, []), [label for label, some in zip(labels, step_ids) for _ in some]


@pytest.fixture(scope="module")
def setting(tiny_models, tmp_path_factory):
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("first_loss")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "policy")
    write_jsonl(
        root / "unpaired.jsonl",
        [{"prompt": p, "completions": steps, "labels": [bool(c) for c in labels]} for p, steps, labels in ANSWERS],
    )
    pairs = [(ANSWERS[i], ANSWERS[i + 1]) for i in range(0, 8, 2)]
    write_jsonl(
        root / "paired.jsonl",
        [
            {"prompt": right[0], "chosen": right[1], "rejected": wrong[1], "rejected_labels": wrong[2]}
            for right, wrong in pairs
        ],
    )
    return root, tiny_models, tokenizer


def expected_loss(setting, variant, annotation, reduction, head=None) -> float:
    root, models, tokenizer = setting
    sequences = []
    for prompt, steps, labels in ANSWERS:
        prompt_ids = ids(prompt, tokenizer)
        response, token_labels = tokens_of(prompt, steps, labels, annotation, tokenizer)
        log_f = token_log_probs(models / "policy", prompt_ids, response)
        log_p = token_log_probs(models / "prior", prompt_ids, response)
        u = np.zeros(len(response)) if head is None else value_logits(models / "policy", head, prompt_ids, response)
        sequences.append((log_f, log_p, u, token_labels))
    return pipa_loss(variant, reduction, sequences)


def flags(setting, data, output, **changes):
    root, models, _ = setting
    values = {
        "model.model_name_or_path": models / "policy",
        "prior.model_name_or_path": models / "prior",
        "prior.cache_dir": root / "cache",
        "data.dataset": root / f"{data}.jsonl",
        "ds.param_dtype": "fp32",
        "train.batch_size": 8,
        "train.micro_batch_size": 8,
        "lr_warmup_ratio": 0,
        "ckpt.output_dir": output,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    "variant, annotation, data", itertools.product("mn", ["answer", "step"], ["unpaired", "paired"])
)
@pytest.mark.parametrize("reduction", ["sum", "token_mean", "sequence_mean"])
def test_first_loss_equals_the_formula(setting, tmp_path, variant, annotation, data, reduction):
    expected = expected_loss(setting, variant, annotation, reduction)
    for micro in (1, 3, 8):
        rows = train(
            "train_pipa",
            *flags(
                setting,
                data,
                tmp_path / f"micro{micro}",
                **{
                    "pipa.variant": variant,
                    "data.annotation": annotation,
                    "pipa.loss_reduction": reduction,
                    "train.micro_batch_size": micro,
                },
            ),
        )
        assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant, stage, micro", [("m", 2, 1), ("n", 3, 3)])
def test_first_loss_on_two_ranks(setting, two_ranks, tmp_path, variant, stage, micro):
    changes = {"pipa.variant": variant, "data.annotation": "step", "ds.zero_stage": stage}
    words = flags(setting, "unpaired", tmp_path / "out", **changes, **{"train.micro_batch_size": micro})
    result = two_ranks("train_pipa", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(expected_loss(setting, variant, "step", "sum"), rel=1e-4)


@pytest.mark.parametrize("variant", ["m", "n"])
def test_second_loss_when_only_the_head_was_trained(setting, tmp_path, variant):
    """The value head learns, and its export is what the next step used."""
    changes = {
        "pipa.variant": variant,
        "data.annotation": "step",
        "adam.lr": 0,
        "value.lr": 0.05,
        "train.max_epochs": 2,
        "ckpt.save_steps": 1,
    }
    rows = train("train_pipa", *flags(setting, "unpaired", tmp_path / "out", **changes), "--ckpt.save_hf")
    head = load_file(tmp_path / "out" / "checkpoints" / "global_step1_hf" / "value_head.safetensors")
    assert set(head) == {"dense.weight", "dense.bias", "out.weight", "out.bias"}
    assert head["out.weight"].abs().max() > 0.01
    assert rows[1]["loss"] == pytest.approx(expected_loss(setting, variant, "step", "sum", head), rel=1e-4)


@pytest.mark.parametrize("variant, reduction", [("m", "sum"), ("n", "sum"), ("n", "sequence_mean")])
def test_where_the_gradient_comes_from(setting, tmp_path, variant, reduction):
    """Pulls by hand, with g = 1/2: 1 and F / (1 - F) under PIPA-M, 1 - F and F under PIPA-N."""
    root, models, tokenizer = setting
    weights = [1.0, 0.5, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0]
    rows = [{**row, "weight": weight} for row, weight in zip(read_jsonl(root / "unpaired.jsonl"), weights)]
    changes = {
        "data.dataset": write_jsonl(tmp_path / "weighted.jsonl", rows),
        "data.annotation": "step",
        "pipa.variant": variant,
        "pipa.loss_reduction": reduction,
        "train.micro_batch_size": 3,
    }
    row = train("train_pipa", *flags(setting, "unpaired", tmp_path / "out", **changes))[0]
    pulls, labels = [], []
    for (prompt, steps, step_labels), weight in zip(ANSWERS, weights):
        response, token_labels = tokens_of(prompt, steps, step_labels, "step", tokenizer)
        of_models = [token_log_probs(models / one, ids(prompt, tokenizer), response) for one in ("policy", "prior")]
        ratio = np.exp(of_models[0] - of_models[1])
        F = ratio / 2 if variant == "m" else ratio / (1 + ratio)
        of_right, of_wrong = (np.ones_like(F), np.where(F < 1, F / (1 - F), 0)) if variant == "m" else (1 - F, F)
        share = weight / (len(response) if reduction == "sequence_mean" else 1)
        pulls.extend(np.where(token_labels, of_right, of_wrong) * share)
        labels.extend(token_labels)
    pulls, labels = np.array(pulls), np.array(labels)
    assert row["pipa/gradient_rejected"] == pytest.approx(pulls[labels == 0].sum() / pulls.sum(), rel=1e-4)
    spread = pulls.sum() ** 2 / (len(pulls) * np.square(pulls).sum())
    assert row["pipa/gradient_spread"] == pytest.approx(spread, rel=1e-4)


def test_interpreted_metrics_at_the_first_step(setting, tmp_path):
    """rewards, logratio, value likelihood and F against sums by hand."""
    rows = train("train_pipa", *flags(setting, "unpaired", tmp_path / "out", **{"data.annotation": "step"}))
    root, models, tokenizer = setting
    sums = {1: [], 0: []}
    F = {1: [], 0: []}
    for prompt, steps, labels in ANSWERS:
        prompt_ids = ids(prompt, tokenizer)
        response, token_labels = tokens_of(prompt, steps, labels, "step", tokenizer)
        r = token_log_probs(models / "policy", prompt_ids, response) - token_log_probs(
            models / "prior", prompt_ids, response
        )
        sums[labels[-1]].append(r.sum())
        for value, c in zip(r, token_labels):
            F[c].append(np.exp(value) / 2 if c else min(np.exp(value) / 2, 1))
    row = rows[0]
    assert row["rewards/chosen"] == pytest.approx(np.mean(sums[1]), rel=1e-4)
    assert row["logratio/rejected"] == pytest.approx(np.mean(sums[0]), rel=1e-4)
    assert row["rewards/margins"] == pytest.approx(np.mean(sums[1]) - np.mean(sums[0]), rel=1e-4)
    assert row["pipa/value_likelihood"] == pytest.approx(0.5, rel=1e-6)
    assert row["pipa/F_chosen"] == pytest.approx(np.mean(F[1]), rel=1e-4)
    assert row["pipa/F_rejected"] == pytest.approx(np.mean(F[0]), rel=1e-4)
    assert row["pipa/clip_fraction"] == pytest.approx(np.mean([value == 1 for value in F[0]]))
    assert row["step"] == 1 and row["epoch"] == 1.0 and row["grad_norm"] > 0
