"""KTO and Step-KTO: the likelihood of the label under a prior on the negative conditional (appendix A.2 and B)."""

import torch

from pipa_openrlhf.losses.answers import Answers, stop_gradient_where


def kto_terms(
    log_ratio: torch.Tensor,
    label: torch.Tensor,
    z0: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """1 - sigmoid(beta (R - z0)) where the label is 1, 1 - sigmoid(beta (z0 - R)) where it is 0, weighted.

    Args:
        log_ratio: sums R of r_t, over an answer or over a step; any one shape.
        label: the same shape.
        z0: scalar without gradient.

    Returns:
        The same shape.
    """
    scaled = beta * (log_ratio - z0)
    desirable = desirable_weight * torch.sigmoid(-scaled)
    undesirable = undesirable_weight * torch.sigmoid(scaled)
    return torch.where(label != 0, desirable, undesirable)


def kto_answer_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """One KTO term an answer. Returns [B]."""
    return kto_terms(
        answers.log_ratio.sum(dim=1), answers.answer_label, answers.z0, beta, desirable_weight, undesirable_weight
    )


def kto_l1_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """L1-KTO: as KTO, but the right steps of a wrong answer get no gradient. Returns [B]."""
    right_steps_of_wrong = (answers.labels != 0) & (answers.answer_label == 0)[:, None]
    sums = stop_gradient_where(right_steps_of_wrong, answers.log_ratio).sum(dim=1)
    return kto_terms(sums, answers.answer_label, answers.z0, beta, desirable_weight, undesirable_weight)


def step_kto_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """Step-KTO: one KTO term a step, on the step's own sum of r_t and label, summed over an answer's steps.

    Steps without a token inside the mask have no term. Returns [B].
    """
    # Numbers of the steps that have tokens: some texts of steps give none, so that a step's own number may exceed T.
    is_first = answers.step_ids.diff(dim=1, prepend=answers.step_ids[:, :1]) != 0
    steps = is_first.cumsum(dim=1)

    def per_step(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values).scatter_add(1, steps, values)

    mask = answers.mask.to(answers.log_ratio.dtype)
    tokens = per_step(mask)
    right_tokens = per_step(mask * answers.labels)
    terms = kto_terms(
        per_step(answers.log_ratio), right_tokens, answers.z0, beta, desirable_weight, undesirable_weight
    )
    return (terms * (tokens > 0)).sum(dim=1)
