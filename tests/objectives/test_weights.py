"""A record's weight multiplies its loss, and changes nothing else."""

from dataclasses import replace

import pytest
import torch
from samples import random_samples
from tiny import train, write_jsonl

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.samples import as_samples
from pipa_openrlhf.data.training_set import TrainingSet
from pipa_openrlhf.model.policy import PolicyOutput
from pipa_openrlhf.objectives.batch_loss import BatchLoss, count_batch
from pipa_openrlhf.objectives.table import objectives

WEIGHTS = [2.0, 2.0, 0.0, 0.0, 0.5, 0.5]
Z0 = torch.tensor(0.1)


@pytest.fixture
def answers():
    """Three pairs, right and wrong, and a policy's log f and u on each of their six answers."""
    samples = random_samples([(3, length) for length in (4, 6, 2, 5, 3, 7)], vocab_size=30)
    samples = [replace(one, answer_label=1 - number % 2) for number, one in enumerate(samples)]
    generator = torch.Generator().manual_seed(0)
    return samples, [torch.randn(2, len(one.labels), generator=generator) - 1 for one in samples]


def share(loss: BatchLoss, samples, scores, counts) -> torch.Tensor:
    batch = collate(samples, [score[0].numpy() * 0.9 for score in scores], 0, "padded")
    log_f, u = torch.nn.utils.rnn.pad_sequence([score.T for score in scores], batch_first=True).unbind(-1)
    return loss.share(PolicyOutput(log_f=log_f, u=u, aux_loss=torch.zeros(())), batch, counts, Z0)


@pytest.mark.parametrize("name", sorted(objectives()))
def test_the_loss_is_the_weighted_sum_of_the_answers_losses(answers, name):
    samples, scores = answers
    objective = replace(objectives()[name], sft_coef=0.3, nll_coef=0.2)
    loss, unit = BatchLoss(objective), 2 if objective.needs_pairs else 1
    counts = count_batch(*map(as_samples(samples).column, ("loss_tokens", "right_tokens", "answer_label")), unit)
    weighted = [replace(one, weight=weight) for one, weight in zip(samples, WEIGHTS, strict=True)]
    alone = [
        WEIGHTS[start] * share(loss, samples[start : start + unit], scores[start : start + unit], counts)
        for start in range(0, len(samples), unit)
    ]
    torch.testing.assert_close(share(loss, weighted, scores, counts), sum(alone))


def test_a_weight_is_part_of_the_data(answers):
    samples, _ = answers
    changed = [replace(samples[0], weight=2.0), *samples[1:]]
    assert TrainingSet(as_samples(samples)).fingerprint() != TrainingSet(as_samples(changed)).fingerprint()


@pytest.mark.parametrize("fused", ["true", "false"])
def test_the_first_loss_of_a_run_is_ln_2_a_weighted_token(small_run, tmp_path, fused):
    """``abc`` and its eos are four tokens, as ``de`` and its eos are three; the batch has three answers."""
    rows = [
        {"prompt": "Q", "completion": "abc", "label": 1, "weight": 3},
        {"prompt": "Q", "completion": "abc", "label": 0},
        {"prompt": "R", "completion": "de", "label": 0, "weight": 0.5},
    ]
    changes = {
        "data.dataset": write_jsonl(tmp_path / "data.jsonl", rows),
        "data.annotation": "answer",
        "prior.model_name_or_path": None,
        "train.batch_size": 3,
        "train.max_epochs": 1,
        "train.fused_head": fused,
        "ckpt.save_steps": None,
    }
    [row] = train("train_pipa", *small_run("out", **changes))
    assert row["loss"] == pytest.approx(0.6931472 * (3 * 4 + 4 + 0.5 * 3) / 3, rel=1e-5)
