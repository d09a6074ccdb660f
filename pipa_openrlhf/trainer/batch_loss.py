"""The loss of a global batch, one micro-batch at a time."""

import math
from dataclasses import dataclass

import torch

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.losses.answers import Answers
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.losses.reduction import BatchCounts, chosen_nll_weights, sft_term_weights, token_weights


@dataclass(frozen=True)
class LossSettings:
    """What the loss is made of, beside the objective.

    Attributes:
        reduction: of token losses, see ``losses/reduction.py``.
        sft_coef: weight of the NLL of right tokens (Table 4).
        nll_coef: weight of the NLL of chosen answers, OpenRLHF's ``--model.nll_loss_coef``.
        aux_coef: weight of the MoE balancing loss.
        fixed_value: g in place of the value head (Table 2).
    """

    reduction: str = "sum"
    sft_coef: float = 0.0
    nll_coef: float = 0.0
    aux_coef: float = 0.0
    fixed_value: float | None = None


@dataclass(frozen=True)
class BatchLoss:
    """An objective with its settings.

    A micro-batch's share depends on counts of its global batch, so that shares add up to the same loss and gradient
    however the batch is cut into micro-batches and ranks.
    """

    objective: Objective
    settings: LossSettings

    def value_logits(self, u: torch.Tensor) -> torch.Tensor:
        """[B, T] value logits: the head's, or those of the fixed g."""
        g = self.settings.fixed_value
        return u if g is None else torch.full_like(u, math.log(g) - math.log1p(-g))

    def share(
        self,
        log_f: torch.Tensor,
        u: torch.Tensor,
        aux_loss: torch.Tensor,
        batch: Batch,
        counts: BatchCounts,
        z0: torch.Tensor,
    ) -> torch.Tensor:
        """This micro-batch's share of the global loss.

        Args:
            log_f, u: [B, T] float32.
            aux_loss: scalar, the MoE balancing loss of this micro-batch.
            z0: scalar, KTO's reference point of the global batch.

        Returns:
            Scalar.
        """
        settings = self.settings
        if self.objective.token_loss is not None:
            token_loss = self.objective.token_loss(log_f, batch.log_p, u, batch.labels)
            loss = (token_loss * token_weights(batch.mask, settings.reduction, counts)).sum()
        else:
            loss = self.objective.answer_loss(answers_of(log_f, batch, z0)).sum() / counts.units
        if settings.sft_coef:
            loss = loss - settings.sft_coef * (log_f * sft_term_weights(batch.labels, batch.mask, counts)).sum()
        if settings.nll_coef:
            weights = chosen_nll_weights(batch.answer_label, batch.mask, counts)
            loss = loss - settings.nll_coef * (log_f * weights).sum()
        if settings.aux_coef:
            loss = loss + settings.aux_coef * aux_loss * (len(batch.labels) / counts.sequences)
        return loss


def answers_of(log_f: torch.Tensor, batch: Batch, z0: torch.Tensor) -> Answers:
    """The view of a micro-batch that answer-level losses take."""
    log_ratio = torch.where(batch.mask != 0, log_f - batch.log_p, torch.zeros_like(log_f))
    return Answers(log_ratio, batch.labels, batch.mask, batch.step_ids, batch.answer_label, z0)
