"""DPO, IPO and Step-DPO: a pairwise loss under a prior on the negative conditional (appendix A.1 and B)."""

import torch
import torch.nn.functional as F

from pipa_openrlhf.losses.answers import Answers, stop_gradient_where


def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (R+ - R-)), with the labels flipped with probability ``label_smoothing``.

    Args:
        chosen, rejected: [P] sums R of r_t over an answer.

    Returns:
        [P] losses.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """((R+ - R-) - 1 / (2 beta))^2, OpenRLHF's convention of sums. Args and result as in :func:`dpo_loss`."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def pair_sums(answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """R of chosen and rejected answers, each [B / 2]."""
    sums = answers.log_ratio.sum(dim=1)
    return sums[0::2], sums[1::2]


def step_pair_sums_l0(answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Step-DPO L0: the right steps of a rejected answer are left out of its R. Each [B / 2]."""
    left_out = _right_steps_of_rejected(answers)
    sums = torch.where(left_out, torch.zeros_like(answers.log_ratio), answers.log_ratio).sum(dim=1)
    return sums[0::2], sums[1::2]


def step_pair_sums_l1(answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Step-DPO L1: the right steps of a rejected answer count in its R but get no gradient. Each [B / 2]."""
    sums = stop_gradient_where(_right_steps_of_rejected(answers), answers.log_ratio).sum(dim=1)
    return sums[0::2], sums[1::2]


def _right_steps_of_rejected(answers: Answers) -> torch.Tensor:
    return (answers.labels != 0) & (answers.answer_label == 0)[:, None]
