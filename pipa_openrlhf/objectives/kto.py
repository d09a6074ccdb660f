"""KTO and Step-KTO: the likelihood of the label under a prior on the negative conditional (appendix A.2 and B)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.objective import (
    BY_KL,
    LIKELIHOOD,
    NEGATIVE,
    SEQUENCE,
    STEP,
    Answers,
    Objective,
    ObjectiveConfig,
    stop_gradient_where,
)
from pipa_openrlhf.settings import setting


@dataclass(frozen=True)
class KtoConfig(ObjectiveConfig):
    """Settings of KTO and Step-KTO."""

    flag_group: ClassVar[str] = "kto"
    module: ClassVar[str] = "train_kto"
    hidden_groups: ClassVar[tuple[str, ...]] = ("value",)
    without_effect: ClassVar[tuple[str, ...]] = (
        *("model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
    )

    step_loss: str = setting(
        "l1",
        "l1: no gradient for right steps of a wrong answer; per_step: one term a step (with step annotation)",
        choices=("l1", "per_step"),
    )
    desirable_weight: float = setting(1.0, "weight of right answers, lambda_D", least=0)
    undesirable_weight: float = setting(1.0, "weight of wrong answers, lambda_U", least=0)
    sft_coef: float = setting(0.0, "weight of the NLL on right tokens (Table 4: 1.0)", least=0)

    def make_objective(self, config) -> Objective:
        """Step-KTO on step labels, or KTO."""
        weights = (config.model.beta, self.desirable_weight, self.undesirable_weight)
        objective = step_kto(self.step_loss, *weights) if config.data.annotation == "step" else kto(*weights)
        return replace(objective, sft_coef=self.sft_coef)

    def check(self, config) -> None:
        """Raises UserError."""
        if not config.model.beta > 0:
            raise UserError(f"--model.beta must be above 0, got {config.model.beta}")

    def idle_flags(self, config) -> list[str]:
        """Lines about flags that were set and change nothing."""
        if self.step_loss != KtoConfig.step_loss and config.data.annotation != "step":
            return ["--kto.step_loss has no effect without --data.annotation step"]
        return []


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """KTO."""
    return _kto("KTO", SEQUENCE, kto_answer_loss, beta, desirable_weight, undesirable_weight)


def step_kto(
    step_loss: str = "l1", beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Step-KTO, ``l1`` or ``per_step`` (appendix B)."""
    loss = {"l1": kto_l1_loss, "per_step": step_kto_loss}[step_loss]
    objective = _kto(f"Step-KTO ({step_loss})", STEP, loss, beta, desirable_weight, undesirable_weight)
    return replace(objective, needs_step_labels=True)


def _kto(
    name: str, level: str, loss: Callable, beta: float, desirable_weight: float, undesirable_weight: float
) -> Objective:
    weights = dict(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return Objective(
        name,
        NEGATIVE,
        BY_KL,
        LIKELIHOOD,
        level,
        answer_loss=partial(loss, **weights),
        needs_mismatched=True,
        reward_scale=beta,
        loss_at_prior=0.5 if loss is not step_kto_loss and desirable_weight == undesirable_weight == 1 else None,
    )


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
