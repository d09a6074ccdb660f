"""The loss of a global batch, one micro-batch at a time."""

from dataclasses import dataclass

import torch

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.losses.answers import Answers
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.losses.reduction import BatchCounts, chosen_nll_weights, sft_term_weights, token_weights
from pipa_openrlhf.losses.token_terms import TokenTerms
from pipa_openrlhf.models.policy import PolicyOutput


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

    def token_terms(self, batch: Batch, counts: BatchCounts) -> TokenTerms:
        """The loss of a token-separable objective as terms over the labelled tokens of ``batch``."""

        def flat(values: torch.Tensor) -> torch.Tensor:
            return values.flatten()[batch.token_index]

        return TokenTerms(
            self.objective.token_loss,
            flat(batch.log_p),
            flat(batch.labels),
            flat(token_weights(batch.mask, self.settings.reduction, counts)),
            flat(self._nll_weights(batch, counts)),
        )

    def share(self, output: PolicyOutput, batch: Batch, counts: BatchCounts, z0: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the global loss.

        Args:
            output: of the policy on ``batch``.
            z0: scalar, KTO's reference point of the global batch.

        Returns:
            Scalar.
        """
        if output.loss is not None:
            loss = output.loss
        elif self.objective.token_loss is not None:
            log_f, u = (values.flatten()[batch.token_index] for values in (output.log_f, output.u))
            loss = self.token_terms(batch, counts).loss(log_f, u)
        else:
            losses = self.objective.answer_loss(answers_of(output.log_f, batch, z0))
            loss = losses.sum() / counts.units - (output.log_f * self._nll_weights(batch, counts)).sum()
        if self.settings.aux_coef:
            loss = loss + self.settings.aux_coef * output.aux_loss * (len(batch.labels) / counts.sequences)
        return loss

    def _nll_weights(self, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """[B, T] weights of -log f that make the SFT and NLL terms."""
        weights = torch.zeros(batch.mask.shape, device=batch.mask.device)
        if self.settings.sft_coef:
            weights = weights + self.settings.sft_coef * sft_term_weights(batch.labels, batch.mask, counts)
        if self.settings.nll_coef:
            weights = weights + self.settings.nll_coef * chosen_nll_weights(batch.answer_label, batch.mask, counts)
        return weights


def answers_of(log_f: torch.Tensor, batch: Batch, z0: torch.Tensor) -> Answers:
    """The view of a micro-batch that answer-level losses take."""
    log_ratio = torch.where(batch.mask != 0, log_f - batch.log_p, torch.zeros_like(log_f))
    return Answers(log_ratio, batch.labels, batch.mask, batch.step_ids, batch.answer_label, z0)
