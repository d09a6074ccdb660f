"""PIPA losses against float64 formulas, finite differences, and the identities of the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.objectives.pipa import (
    log1mexp,
    pipa_m,
    pipa_m_log_F,
    pipa_m_token_loss,
    pipa_n,
    pipa_n_log_F,
    pipa_n_token_loss,
    sharpened,
)

log_prob = st.floats(-20, -0.01)
logit = st.floats(-8, 8)
label = st.integers(0, 1)


def scalars(*values):
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def reference_m(log_f, log_p, u, c, eps=1e-10):
    """METHOD's formula in float64, straight from probabilities."""
    F = math.exp(log_f) / math.exp(log_p) / (1 + math.exp(-u))
    return -math.log(F) if c else -math.log(1 - min(F, 1 - eps))


def reference_n(log_f, log_p, u, c):
    g = 1 / (1 + math.exp(-u))
    ratio = math.exp(log_f) * g / (math.exp(log_p) * (1 - g))
    F = ratio / (ratio + 1)
    return -math.log(F) if c else -math.log(1 - F)


@given(log_prob, log_prob, logit, label)
def test_pipa_m_equals_the_formula(log_f, log_p, u, c):
    log_F = log_f - log_p - math.log1p(math.exp(-u))
    if c == 0 and abs(log_F) < 1e-3:
        return  # next to the clip float32 cannot say which side a token is on
    got = pipa_m_token_loss(*scalars(log_f, log_p, u), torch.tensor(c)).item()
    assert got == pytest.approx(reference_m(log_f, log_p, u, c), rel=2e-4, abs=2e-5)


@given(st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-5, 5), label)
def test_pipa_n_equals_the_formula(log_f, log_p, u, c):
    got = pipa_n_token_loss(*scalars(log_f, log_p, u), torch.tensor(c)).item()
    assert got == pytest.approx(reference_n(log_f, log_p, u, c), rel=1e-4, abs=1e-5)


@given(log_prob, log_prob, logit)
def test_pipa_n_equals_bayes_rule_with_the_prior_on_the_negative_conditional(log_f, log_p, u):
    g = 1 / (1 + math.exp(-u))
    posterior = math.exp(log_f) * g / (math.exp(log_f) * g + math.exp(log_p) * (1 - g))
    assert pipa_n_log_F(*scalars(log_f, log_p, u)).exp().item() == pytest.approx(posterior, rel=1e-4, abs=1e-7)


@given(log_prob, log_prob, logit)
def test_pipa_m_keeps_the_marginal_where_the_constraint_holds(log_f, log_p, u):
    """Theorem 2.1: p(y, c=1) + p(y, c=0) = prior, with p(y, c=1) = f g, wherever f g <= prior."""
    log_F = pipa_m_log_F(*scalars(log_f, log_p, u))
    if log_F.item() > -1e-3:
        return
    right = pipa_m_token_loss(*scalars(log_f, log_p, u), torch.tensor(1)).neg().exp().item()
    wrong = pipa_m_token_loss(*scalars(log_f, log_p, u), torch.tensor(0)).neg().exp().item()
    assert right + wrong == pytest.approx(1, rel=1e-5)
    g = 1 / (1 + math.exp(-u))
    assert right * math.exp(log_p) == pytest.approx(math.exp(log_f) * g, rel=1e-4)


@pytest.mark.parametrize("loss", [pipa_m_token_loss, pipa_n_token_loss])
@pytest.mark.parametrize("c", [0, 1])
def test_step_zero_loss_is_ln_2(loss, c):
    log_f = torch.tensor([-0.3, -2.0, -15.0])
    assert loss(log_f, log_f, torch.zeros(3), torch.full((3,), c)).tolist() == pytest.approx([math.log(2)] * 3)


@given(log_prob, log_prob)
def test_fixed_value_makes_pipa_n_the_logistic_loss_on_r(log_f, log_p):
    got = pipa_n_token_loss(*scalars(log_f, log_p, 0.0), torch.tensor(1)).item()
    assert got == pytest.approx(np.logaddexp(0, -(log_f - log_p)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss, reference", [(pipa_m_token_loss, reference_m), (pipa_n_token_loss, reference_n)])
@pytest.mark.parametrize("log_f, log_p, u, c", [(-2.0, -1.5, 0.3, 0), (-2.0, -1.5, 0.3, 1), (-0.4, -3.0, -4.0, 0)])
def test_gradients_equal_finite_differences(loss, reference, log_f, log_p, u, c):
    log_f_t, u_t = (torch.tensor(value, requires_grad=True) for value in (log_f, u))
    loss(log_f_t, torch.tensor(log_p), u_t, torch.tensor(c)).backward()
    h = 1e-6
    by_f = (reference(log_f + h, log_p, u, c) - reference(log_f - h, log_p, u, c)) / (2 * h)
    by_u = (reference(log_f, log_p, u + h, c) - reference(log_f, log_p, u - h, c)) / (2 * h)
    assert log_f_t.grad.item() == pytest.approx(by_f, rel=1e-4)
    assert u_t.grad.item() == pytest.approx(by_u, rel=1e-4)


def test_clipped_tokens_have_the_papers_loss_and_no_gradient():
    log_f = torch.tensor([-1.0, -1.0], requires_grad=True)
    losses = pipa_m_token_loss(log_f, torch.tensor([-3.0, -3.0]), torch.zeros(2), torch.tensor([0, 1]), clip_eps=1e-10)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(23.0259, rel=1e-5)
    assert losses[1].item() == pytest.approx(-(2 - math.log(2)), rel=1e-5)  # right tokens are not clipped: F > 1
    assert log_f.grad.tolist() == [0.0, -1.0]


def test_extreme_inputs_give_finite_losses_and_gradients():
    log_f = torch.tensor([-80.0, -1e-8, -80.0, -1e-8, 0.0], requires_grad=True)
    log_p = torch.tensor([-1e-8, -80.0, -1e-8, -80.0, 0.0])
    u = torch.tensor([-60.0, 60.0, 60.0, -60.0, 100.0], requires_grad=True)
    for loss in (pipa_m_token_loss, pipa_n_token_loss):
        for c in (0, 1):
            value = loss(log_f, log_p, u, torch.full((5,), c)).sum()
            gradients = torch.autograd.grad(value, (log_f, u))
            assert torch.isfinite(value) and all(torch.isfinite(one).all() for one in gradients)


@given(st.floats(-50, -1e-6))
def test_log1mexp_is_accurate_at_both_ends(x):
    x = float(np.float32(x))
    exact = math.log1p(-math.exp(x)) if x < -0.7 else math.log(-math.expm1(x))
    assert log1mexp(torch.tensor(x)).item() == pytest.approx(exact, rel=1e-5, abs=1e-30)


@given(st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-5, 5), label, st.floats(0.05, 3))
def test_a_power_of_the_ratio_is_a_multiple_of_the_log_ratio(log_f, log_p, u, c, beta):
    """The formulas in float64, with beta r in the place of r."""
    moved = log_p + beta * (log_f - log_p)
    for objective, reference in ((pipa_m(), reference_m), (pipa_n(), reference_n)):
        if c == 0 and objective.is_clipped and abs(moved - log_p - math.log1p(math.exp(-u))) < 1e-3:
            continue
        got = sharpened(objective, beta).token_loss(*scalars(log_f, log_p, u), torch.tensor(c)).item()
        assert got == pytest.approx(reference(moved, log_p, u, c), rel=5e-4, abs=5e-5)
        log_F = sharpened(objective, beta).log_F(*scalars(log_f, log_p, u)).item()
        assert log_F == pytest.approx(objective.log_F(*scalars(moved, log_p, u)).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("objective", [pipa_m(), pipa_n()])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_target_is_sharper_by_the_power(objective, beta):
    """Minimised exactly over one token's choice, f / p is a power 1 / beta of what it is by the paper."""
    share, g = 0.6, 0.5
    r = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=200, line_search_fn="strong_wolfe")
    loss = sharpened(objective, beta).token_loss

    def closure():
        optimizer.zero_grad()
        u, p = torch.tensor(0.0), torch.tensor(-3.0)
        value = share * loss(p + r, p, u, torch.tensor(1)) + (1 - share) * loss(p + r, p, u, torch.tensor(0))
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    paper = share / g if objective.name == "PIPA-M" else share / (1 - share) * (1 - g) / g
    assert math.exp(r.item()) == pytest.approx(paper ** (1 / beta), rel=1e-2)
    assert (sharpened(objective, beta) is objective) == (beta == 1)
