"""The paper's theorems: PIPA, DPO and KTO as likelihoods of the label under one prior constraint each."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipa_openrlhf.objectives.dpo import dpo_loss
from pipa_openrlhf.objectives.kto import kto_terms
from pipa_openrlhf.objectives.pipa import pipa_m_is_clipped, pipa_m_log_F, pipa_m_token_loss, pipa_n_token_loss

token_log_probs = st.lists(st.floats(-4, -0.01), min_size=1, max_size=4)
# Two distributions over the same few answers y, from any positive numbers.
two_distributions = st.integers(2, 5).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(0.05, 1), min_size=size, max_size=size)] * 2)
)


@st.composite
def scored_answer(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """log f_t and log p_t of one answer, [T] float64 each; log f is a leaf with gradient."""
    log_f = draw(token_log_probs)
    log_p = [draw(st.floats(-4, -0.01)) for _ in log_f]
    return torch.tensor(log_f, dtype=torch.float64, requires_grad=True), torch.tensor(log_p, dtype=torch.float64)


def normalised(weights: list[float]) -> torch.Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    return values / values.sum()


def assert_same_value_and_gradient(one: torch.Tensor, other: torch.Tensor, *leaves: torch.Tensor):
    assert one.item() == pytest.approx(other.item(), rel=1e-9)
    for got, expected in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (one, other))):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


@given(scored_answer(), scored_answer(), st.integers(0, 1))
def test_theorem_a1_dpo_is_the_likelihood_of_which_answer_is_right(chosen, rejected, c):
    """-log p(c | x, (y^c, y^-c)) by Bayes' rule, with p(y|x,c=0) = prior and p(c=1|x) = 1/2, is DPO at beta 1."""
    (log_f_chosen, log_p_chosen), (log_f_rejected, log_p_rejected) = chosen, rejected
    f = {"chosen": log_f_chosen.sum().exp(), "rejected": log_f_rejected.sum().exp()}
    prior = {"chosen": log_p_chosen.sum().exp(), "rejected": log_p_rejected.sum().exp()}
    # y^c was drawn given c, y^-c given 1 - c: where c is 0, y^c is the rejected answer.
    y_c, y_not_c = ("chosen", "rejected") if c else ("rejected", "chosen")

    def probability(y: str, label: int) -> torch.Tensor:
        return f[y] if label else prior[y]

    def h(label: int) -> torch.Tensor:
        return probability(y_c, label) * probability(y_not_c, 1 - label) * 0.5

    likelihood = h(c) / (h(0) + h(1))
    sums = [(log_f - log_p).sum() for log_f, log_p in (chosen, rejected)]
    assert_same_value_and_gradient(dpo_loss(*sums, beta=1.0), -likelihood.log(), log_f_chosen, log_f_rejected)


@given(scored_answer(), st.integers(0, 1), st.floats(0, 3))
def test_theorem_a2_kto_is_one_minus_the_likelihood_of_the_label(answer, c, kl):
    """1 - p(c | x, y), with p(y|x,c=0) = prior and log p(0|x) / p(1|x) = KL, is KTO at beta 1; KL held fixed."""
    log_f, log_p = answer
    right_class = 1 / (1 + math.exp(kl))
    joint_right = log_f.sum().exp() * right_class
    joint_wrong = log_p.sum().exp() * (1 - right_class)
    likelihood = (joint_right if c else joint_wrong) / (joint_right + joint_wrong)
    loss = kto_terms((log_f - log_p).sum(), torch.tensor(c), torch.tensor(kl, dtype=torch.float64), beta=1.0)
    assert_same_value_and_gradient(loss, 1 - likelihood, log_f)


@given(two_distributions)
def test_theorem_a2_over_all_answers_with_the_exact_kl(weights):
    """Expected loss over a whole space of answers, drawn from the joint that the constraint defines."""
    f, prior = map(normalised, weights)
    kl = (f * (f / prior).log()).sum()
    right_class = 1 / (1 + kl.exp())
    joint = torch.stack([prior * (1 - right_class), f * right_class])  # [c, y]
    assert joint.sum().item() == pytest.approx(1)
    posterior = joint / joint.sum(dim=0)
    log_ratio = (f / prior).log()
    for c in (0, 1):
        terms = kto_terms(log_ratio, torch.full((len(f),), c), kl, beta=1.0)
        torch.testing.assert_close(terms, 1 - posterior[c])


@given(two_distributions, st.floats(0.05, 0.95))
def test_theorem_21_the_joint_sums_to_one_and_keeps_the_marginal(weights, value):
    """With g = min(g0, prior / f): p(y, 1) = f g and p(y, 0) = prior - f g, read off PIPA-M's losses."""
    f, prior = map(normalised, weights)
    # In Theorem 2.1 g bounds itself; one step below the bound both losses are finite.
    g = torch.minimum(torch.tensor(value, dtype=torch.float64), 0.999 * prior / f)
    u = (g / (1 - g)).log()
    right = prior * torch.exp(-pipa_m_token_loss(f.log(), prior.log(), u, torch.ones(len(f))).double())
    wrong = prior * torch.exp(-pipa_m_token_loss(f.log(), prior.log(), u, torch.zeros(len(f))).double())
    np.testing.assert_allclose(right, f * g, rtol=1e-4)
    np.testing.assert_allclose(wrong, prior - f * g, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(right + wrong, prior, rtol=1e-4)
    assert (right + wrong).sum().item() == pytest.approx(1, rel=1e-4)
    assert (wrong >= 0).all()


@given(two_distributions, st.floats(0.05, 0.95))
def test_theorem_21_the_constraint_binds_exactly_where_f_reaches_one(weights, g0):
    """The unconstrained g0 breaks prior >= f g0 at the same answers at which F exceeds 1 and PIPA-M clips."""
    f, prior = map(normalised, weights)
    # Float32 cannot say which side of the bound an answer within a millionth of it is on.
    assume(((f * g0 / prior).log().abs() > 1e-5).all())
    u = torch.full((len(f),), math.log(g0 / (1 - g0)), dtype=torch.float64)
    log_F = pipa_m_log_F(f.log(), prior.log(), u)
    broken = prior < f * g0
    assert ((log_F > 0) == broken).all()
    assert (pipa_m_is_clipped(log_F, 1e-10) == broken).all()
    bounded = torch.minimum(torch.tensor(g0, dtype=torch.float64), prior / f)
    at_bound = pipa_m_log_F(f.log(), prior.log(), (bounded / (1 - bounded).clamp(min=1e-12)).log())
    np.testing.assert_allclose(at_bound[broken], 0, atol=1e-5)
    # There the wrong label has the whole of the clip's loss, and nothing to learn from.
    losses = pipa_m_token_loss(f.log(), prior.log(), u, torch.zeros(len(f)))
    np.testing.assert_allclose(losses[broken], -math.log(1e-10), rtol=1e-5)


@given(two_distributions, st.floats(0.05, 0.95))
def test_pipa_n_is_bayes_rule_over_all_answers(weights, value):
    """Both labels' losses are -log p(c | x, y) of the joint f g + prior (1 - g), in value and gradient."""
    f, prior = map(normalised, weights)
    log_f = f.log().requires_grad_()
    g = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    joint = torch.stack([prior * (1 - g), log_f.exp() * g])
    assert joint.sum().item() == pytest.approx(1)
    posterior = joint / joint.sum(dim=0)
    u = (g / (1 - g)).log().expand(len(f))
    for c in (0, 1):
        losses = pipa_n_token_loss(log_f, prior.log(), u, torch.full((len(f),), c))
        np.testing.assert_allclose(losses.detach(), -posterior[c].log().detach(), rtol=1e-4, atol=1e-6)
        ours = torch.autograd.grad(losses.sum(), (log_f, g), retain_graph=True)
        bayes = torch.autograd.grad(-posterior[c].log().sum(), (log_f, g), retain_graph=True)
        for got, expected in zip(ours, bayes):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
