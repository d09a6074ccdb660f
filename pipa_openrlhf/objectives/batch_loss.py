"""The loss of a global batch, one micro-batch at a time."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.objectives.objective import Answers, Objective, TokenLoss


class PolicyOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        log_f, u: [B, T] float32, 0 at tokens not asked for.
        aux_loss: scalar, the MoE balancing loss, 0 where not wanted.
        loss: scalar, of the terms that were asked for; None without any.
    """

    log_f: torch.Tensor
    u: torch.Tensor
    aux_loss: torch.Tensor
    loss: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenTerms:
    """sum over tokens of weight x token loss + nll_weight x -log f, for N tokens that have M scores (log f, u).

    Because it is a sum over tokens, it can be evaluated on any slice of the scores, and its gradient with respect to
    the hidden states can be formed while the logits of that slice are alive. Tokens that share a score differ in
    label, weight and prior.

    Attributes:
        token_loss: elementwise, see ``objectives/pipa.py``.
        log_p, labels, weights, nll_weights: [N].
        score_index: [N] which of the scores is a token's, never falling; None: one each, N = M.
    """

    token_loss: TokenLoss
    log_p: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    nll_weights: torch.Tensor
    score_index: torch.Tensor | None = None

    def loss(self, log_f: torch.Tensor, u: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Scalar loss of the tokens whose scores are in ``part``; ``log_f`` and ``u`` are those scores, [m]."""
        if self.score_index is None:
            return self.of_tokens(log_f, u, part)
        first, last, _ = part.indices(len(self._first_tokens) - 1)
        tokens = slice(self._first_tokens[first], self._first_tokens[last])
        score_index = self.score_index[tokens] - first
        return self.of_tokens(log_f.index_select(0, score_index), u.index_select(0, score_index), tokens)

    def of_tokens(self, log_f: torch.Tensor, u: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Scalar loss of the tokens in ``part``; ``log_f`` and ``u`` are theirs, [n]."""
        token_loss = self.token_loss(log_f, self.log_p[part], u, self.labels[part])
        return (token_loss * self.weights[part] - self.nll_weights[part] * log_f).sum()

    @cached_property
    def _first_tokens(self) -> list[int]:
        """[M + 1] first token of every score, and N; a list, so that a chunk does not wait for the device."""
        assert self.score_index is not None
        counts = torch.bincount(self.score_index).tolist()
        return list(accumulate(counts, initial=0))


@dataclass(frozen=True)
class BatchCounts:
    """Counts of one global batch, known before its first micro-batch. A unit is an answer, or a pair of them."""

    units: int
    sequences: int
    labelled_tokens: int
    sequences_with_right_tokens: int
    right_answers: int


def count_batch(
    loss_tokens: np.ndarray, right_tokens: np.ndarray, answer_labels: np.ndarray, unit_size: int = 1
) -> BatchCounts:
    """Counts of a global batch.

    Args:
        loss_tokens: [B] tokens inside the mask of each sequence.
        right_tokens: [B] those of them that are right.
        answer_labels: [B].
    """
    return BatchCounts(
        units=len(loss_tokens) // unit_size,
        sequences=len(loss_tokens),
        labelled_tokens=int(loss_tokens.sum(dtype=np.int64)),
        sequences_with_right_tokens=int(np.count_nonzero(right_tokens)),
        right_answers=int(answer_labels.sum(dtype=np.int64)),
    )


def token_weights(mask: torch.Tensor, reduction: str, counts: BatchCounts) -> torch.Tensor:
    """Weight of every token's loss.

    Args:
        mask: [B, T], 1 on labelled response tokens.
        reduction: ``sum``: sum over a sequence's tokens, mean over sequences (Algorithm 1); ``token_mean``: mean over
            all labelled tokens; ``sequence_mean``: mean over a sequence's tokens, then over sequences.
        counts: of the global batch that these rows belong to.

    Returns:
        [B, T] float32; 0 outside the mask.
    """
    mask = mask.float()
    if reduction == "sum":
        return mask / counts.sequences
    if reduction == "token_mean":
        return mask / counts.labelled_tokens
    if reduction == "sequence_mean":
        return mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * counts.sequences)
    raise ValueError(f"unknown reduction {reduction!r}")


def sft_term_weights(labels: torch.Tensor, mask: torch.Tensor, counts: BatchCounts) -> torch.Tensor:
    """Weights of -log f that make the SFT term: mean over a sequence's right tokens, then over the sequences that
    have any (Table 4).

    Args:
        labels, mask: [B, T].

    Returns:
        [B, T] float32; 0 outside right tokens.
    """
    right = labels.float() * mask.float()
    return right / (right.sum(dim=1, keepdim=True).clamp(min=1) * max(counts.sequences_with_right_tokens, 1))


def chosen_nll_weights(answer_label: torch.Tensor, mask: torch.Tensor, counts: BatchCounts) -> torch.Tensor:
    """Weights of -log f that make OpenRLHF's NLL term of DPO: mean over a chosen answer's tokens, then over chosen
    answers.

    Args:
        answer_label: [B].
        mask: [B, T].

    Returns:
        [B, T] float32; 0 on rejected answers.
    """
    mask = mask.float()
    per_answer = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return per_answer * answer_label.float()[:, None] / max(counts.right_answers, 1)


@dataclass(frozen=True)
class BatchLoss:
    """An objective, with ``aux_coef`` times the MoE balancing loss.

    A micro-batch's share depends on counts of its global batch, so that shares add up to the same loss and gradient
    however the batch is cut into micro-batches and ranks. An answer's own weight multiplies its loss and no count.
    """

    objective: Objective
    aux_coef: float = 0.0

    def token_terms(self, batch: Batch, counts: BatchCounts) -> TokenTerms:
        """The loss of a token-separable objective as terms over the labelled tokens of ``batch``."""

        token_loss = self.objective.token_loss
        if token_loss is None:
            raise ValueError(f"{self.objective.name} is no sum over tokens")

        def flat(values: torch.Tensor) -> torch.Tensor:
            return values.flatten()[batch.token_index]

        return TokenTerms(
            token_loss,
            flat(batch.log_p),
            flat(batch.labels),
            flat(token_weights(batch.mask, self.objective.reduction, counts) * batch.weight[:, None]),
            flat(self._nll_weights(batch, counts)),
            batch.score_index,
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
        elif self.objective.answer_loss is not None:
            losses = self.objective.answer_loss(answers_of(output.log_f, batch, z0))
            weights = batch.weight[:: len(batch.weight) // len(losses)]  # of a pair, its chosen side's
            loss = (losses * weights).sum() / counts.units - (output.log_f * self._nll_weights(batch, counts)).sum()
        else:
            log_f, u = (values.flatten()[batch.token_index] for values in (output.log_f, output.u))
            loss = self.token_terms(batch, counts).of_tokens(log_f, u)
        if self.aux_coef:
            loss = loss + self.aux_coef * output.aux_loss * (len(batch.labels) / counts.sequences)
        return loss

    def _nll_weights(self, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """[B, T] weights of -log f that make the SFT and NLL terms."""
        weights = torch.zeros(batch.mask.shape, device=batch.mask.device)
        if self.objective.sft_coef:
            weights = weights + self.objective.sft_coef * sft_term_weights(batch.labels, batch.mask, counts)
        if self.objective.nll_coef:
            weights = weights + self.objective.nll_coef * chosen_nll_weights(batch.answer_label, batch.mask, counts)
        return weights * batch.weight[:, None]


def answers_of(log_f: torch.Tensor, batch: Batch, z0: torch.Tensor) -> Answers:
    """The view of a micro-batch that answer-level losses take."""
    log_ratio = torch.where(batch.mask != 0, log_f - batch.log_p, torch.zeros_like(log_f))
    return Answers(log_ratio, batch.labels, batch.mask, batch.step_ids, batch.answer_label, z0)
