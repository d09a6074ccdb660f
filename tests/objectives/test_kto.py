"""KTO against its formula in float64 and finite differences, and its weights."""

import math

import pytest
import torch
from answer_rows import Row, answer_rows, as_answers, gradient
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.objectives.kto import kto, kto_terms

batches = st.lists(answer_rows(), min_size=1, max_size=4)
betas = st.sampled_from([0.01, 0.1, 0.5, 1.0])
reference_points = st.integers(0, 24).map(lambda value: value / 8)
weights = st.sampled_from([(1.0, 1.0), (1.5, 0.5), (1.0, 0.0)])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kto_by_hand(total: float, right: int, z0: float, beta: float, desirable: float, undesirable: float) -> float:
    if right:
        return desirable * (1 - sigmoid(beta * (total - z0)))
    return undesirable * (1 - sigmoid(beta * (z0 - total)))


@given(batches, reference_points, betas, weights)
def test_value_and_gradient(rows, z0, beta, weights):
    loss = kto(beta, *weights).answer_loss
    expected = [kto_by_hand(row.total(), row.answer_label, z0, beta, *weights) for row in rows]
    answers = as_answers(rows, z0)
    losses = loss(answers)
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss(as_answers(rows, z0, torch.float32)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    h = 1e-5
    for row, got in zip(rows, gradient(answers, losses)):
        by_sum = [kto_by_hand(row.total() + s, row.answer_label, z0, beta, *weights) for s in (h, -h)]
        slope = (by_sum[0] - by_sum[1]) / (2 * h)  # every token of the answer moves its sum alike
        assert got == pytest.approx([slope] * len(row.tokens), rel=1e-4, abs=1e-7)


def test_an_answer_at_the_reference_point_costs_half_its_weight():
    terms = kto_terms(torch.tensor([2.0, 2.0]), torch.tensor([1, 0]), torch.tensor(2.0), 0.1, 1.4, 0.6)
    assert terms.tolist() == pytest.approx([0.7, 0.3])


def test_a_higher_reference_point_asks_more_of_right_answers_and_less_of_wrong_ones():
    sums, labels = torch.tensor([1.0, 1.0]), torch.tensor([1, 0])
    low, high = (kto_terms(sums, labels, torch.tensor(z0), 0.1) for z0 in (0.0, 3.0))
    assert high[0] > low[0] and high[1] < low[1]


def test_extreme_sums_stay_finite():
    rows = [Row([(4000.0, 0, 0)], 0), Row([(-4000.0, 1, 0)], 1)]
    answers = as_answers(rows, dtype=torch.float32)
    losses = kto().answer_loss(answers)
    assert losses.tolist() == [1.0, 1.0]
    assert gradient(answers, losses) == [[0.0], [0.0]]
