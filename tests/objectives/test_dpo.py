"""DPO, IPO and smoothed DPO against formulas in float64, finite differences and OpenRLHF's own loss."""

import math

import pytest
import torch
from answer_rows import Row, as_answers, gradient, pair_rows
from hypothesis import given
from hypothesis import strategies as st

import pipa_openrlhf.distributed.upstream  # noqa: F401  (makes openrlhf.models importable without flash-attn)
from pipa_openrlhf.objectives.dpo import dpo, ipo
from pipa_openrlhf.objectives.objective import Objective

betas = st.sampled_from([0.01, 0.1, 0.5, 1.0])


def dpo_by_hand(chosen: float, rejected: float, beta: float, smoothing: float = 0.0) -> float:
    margin = beta * (chosen - rejected)
    # -log of the probability that the pair is as labelled, and that it is the other way round.
    as_labelled, flipped = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
    return (1 - smoothing) * as_labelled + smoothing * flipped


def ipo_by_hand(chosen: float, rejected: float, beta: float) -> float:
    return ((chosen - rejected) - 1 / (2 * beta)) ** 2


def losses_by_hand(rows: list[Row], formula, *parameters) -> list[float]:
    return [formula(rows[i].total(), rows[i + 1].total(), *parameters) for i in range(0, len(rows), 2)]


def finite_differences(rows: list[Row], formula, *parameters) -> list[list[float]]:
    """Central differences of the summed losses by every token's r_t."""
    h = 1e-5

    def total_with(row: int, token: int, shift: float) -> float:
        moved = [Row(list(one.tokens), one.answer_label) for one in rows]
        r, *rest = moved[row].tokens[token]
        moved[row].tokens[token] = (r + shift, *rest)
        return sum(losses_by_hand(moved, formula, *parameters))

    return [
        [(total_with(i, t, h) - total_with(i, t, -h)) / (2 * h) for t in range(len(row.tokens))]
        for i, row in enumerate(rows)
    ]


def assert_value_and_gradient(objective: Objective, rows, formula, *parameters):
    loss = objective.answer_loss
    expected = losses_by_hand(rows, formula, *parameters)
    answers = as_answers(rows)
    losses = loss(answers)
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for got, by_hand in zip(gradient(answers, losses), finite_differences(rows, formula, *parameters)):
        assert got == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    in_float32 = loss(as_answers(rows, dtype=torch.float32))
    assert in_float32.dtype == torch.float32
    assert in_float32.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(pair_rows(), betas)
def test_dpo(rows, beta):
    assert_value_and_gradient(dpo(beta), rows, dpo_by_hand, beta)


@given(pair_rows(), betas, st.sampled_from([0.1, 0.3]))
def test_smoothed_dpo(rows, beta, smoothing):
    assert_value_and_gradient(dpo(beta, smoothing), rows, dpo_by_hand, beta, smoothing)


@given(pair_rows(), betas)
def test_ipo(rows, beta):
    assert_value_and_gradient(ipo(beta), rows, ipo_by_hand, beta)


def test_dpo_without_a_margin_is_ln_2_and_ipo_its_target_squared():
    rows = [Row([(1.5, 1, 0)], 1), Row([(1.0, 0, 0), (0.5, 0, 0)], 0)]
    assert dpo(0.1).answer_loss(as_answers(rows)).tolist() == pytest.approx([math.log(2)])
    assert ipo(0.1).answer_loss(as_answers(rows)).tolist() == pytest.approx([25.0])


@pytest.mark.parametrize("smoothing, is_ipo", [(0.0, False), (0.2, False), (0.0, True)])
@given(rows=pair_rows(), beta=betas)
def test_the_mean_is_openrlhfs_loss(smoothing, is_ipo, rows, beta):
    from openrlhf.models import DPOLoss

    answers = as_answers(rows)
    ours = (ipo(beta) if is_ipo else dpo(beta, smoothing)).answer_loss(answers).mean()
    sums = answers.log_ratio.sum(dim=1)
    # Any split into policy and reference with these differences will do.
    reference = torch.arange(len(rows), dtype=torch.float64)
    policy = sums + reference
    theirs, _, _ = DPOLoss(beta, smoothing, is_ipo)(policy[0::2], policy[1::2], reference[0::2], reference[1::2])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, answers.log_ratio, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_extreme_margins_stay_finite():
    rows = [Row([(-4000.0, 1, 0)], 1), Row([(4000.0, 0, 0)], 0)]
    answers = as_answers(rows, dtype=torch.float32)
    losses = dpo(1.0).answer_loss(answers)
    assert losses.tolist() == pytest.approx([8000.0])
    assert all(math.isfinite(one) for row in gradient(answers, losses) for one in row)
