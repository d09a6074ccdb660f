"""DPO, IPO and Step-DPO: a pairwise loss under a prior on the negative conditional (appendix A.1 and B)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.objective import (
    HALF,
    NEGATIVE,
    OUTSIDE,
    PAIRWISE,
    SEQUENCE,
    STEP,
    Answers,
    Objective,
    ObjectiveConfig,
    stop_gradient_where,
)
from pipa_openrlhf.settings import setting


@dataclass(frozen=True)
class DpoConfig(ObjectiveConfig):
    """Settings of DPO, IPO and Step-DPO; what OpenRLHF has too is in ``ModelConfig``."""

    flag_group: ClassVar[str] = "dpo"
    module: ClassVar[str] = "train_dpo"
    hidden_groups: ClassVar[tuple[str, ...]] = ("value",)

    step_loss: str = setting(
        "l1",
        "right steps of a rejected answer: l1 stops their gradient, l0 leaves them out (with step annotation)",
        choices=("l1", "l0"),
    )

    def make_objective(self, config) -> Objective:
        """IPO, Step-DPO on step labels, or DPO."""
        model = config.model
        if model.ipo_enable:
            objective = ipo(model.beta)
        elif config.data.annotation == "step":
            objective = step_dpo(self.step_loss, model.beta, model.label_smoothing)
        else:
            objective = dpo(model.beta, model.label_smoothing)
        return replace(objective, nll_coef=model.nll_loss_coef)

    def check(self, config) -> None:
        """Raises UserError."""
        model = config.model
        if not model.beta > 0:
            raise UserError(f"--model.beta must be above 0, got {model.beta}")
        if not 0 <= model.label_smoothing < 0.5:
            raise UserError(f"--model.label_smoothing must be at least 0 and below 0.5, got {model.label_smoothing}")
        if model.ipo_enable and config.data.annotation == "step":
            raise UserError(
                "--model.ipo_enable has no step-level loss: use --data.annotation answer, or leave IPO out"
            )

    def idle_flags(self, config) -> list[str]:
        """Lines about flags that were set and change nothing."""
        lines = []
        if config.model.ipo_enable and config.model.label_smoothing:
            lines.append("--model.label_smoothing has no effect with --model.ipo_enable")
        if self.step_loss != DpoConfig.step_loss and config.data.annotation != "step":
            lines.append("--dpo.step_loss has no effect without --data.annotation step")
        return lines


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO; with label smoothing it is outside the paper's family."""
    loss = partial(dpo_loss, beta=beta, label_smoothing=label_smoothing)
    return _pairwise("DPO", SEQUENCE, loss, pair_sums, beta, label_smoothing)


def step_dpo(step_loss: str = "l1", beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Step-DPO on general pairs, ``l1`` or ``l0`` (appendix B)."""
    loss = partial(dpo_loss, beta=beta, label_smoothing=label_smoothing)
    sums = {"l1": step_pair_sums_l1, "l0": step_pair_sums_l0}[step_loss]
    objective = _pairwise(f"Step-DPO ({step_loss})", STEP, loss, sums, beta, label_smoothing)
    return replace(objective, needs_step_labels=True)


def ipo(beta: float = 0.1) -> Objective:
    """IPO."""
    objective = _pairwise("IPO", SEQUENCE, partial(ipo_loss, beta=beta), pair_sums, beta)
    return replace(
        objective,
        prior_constraint=OUTSIDE,
        class_prior=OUTSIDE,
        data_loss="squared margin",
        loss_at_prior=1 / (4 * beta**2),
    )


def _pairwise(
    name: str, level: str, loss: Callable, sums: Callable, beta: float, label_smoothing: float = 0.0
) -> Objective:
    place = (OUTSIDE, OUTSIDE, "pairwise, smoothed") if label_smoothing > 0 else (NEGATIVE, HALF, PAIRWISE)
    return Objective(
        name,
        *place,
        level,
        answer_loss=lambda answers: loss(*sums(answers)),
        needs_pairs=True,
        reward_scale=beta,
        loss_at_prior=math.log(2),
    )


def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (R+ - R-)), with the labels flipped with probability ``label_smoothing``.

    Args:
        chosen, rejected: [P] sums R of r_t over an answer.

    Returns:
        [P] losses.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


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
