"""How token losses become the loss of a global batch.

Every reduction is a weighted sum of token losses. The weights depend on counts of the whole global batch, so that the
sum over micro-batches and ranks is the same however the batch is cut.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BatchCounts:
    """Counts of one global batch, known before its first micro-batch. A unit is an answer, or a pair of them."""

    units: int
    sequences: int
    labelled_tokens: int
    sequences_with_right_tokens: int
    right_answers: int


def count_batch(answers: list[tuple[np.ndarray, np.ndarray, int]], unit_size: int = 1) -> BatchCounts:
    """Counts from the (labels [T], mask [T], answer label) of every sequence of a global batch."""
    return BatchCounts(
        units=len(answers) // unit_size,
        sequences=len(answers),
        labelled_tokens=sum(int(mask.sum()) for _, mask, _ in answers),
        sequences_with_right_tokens=sum(bool((labels * mask).any()) for labels, mask, _ in answers),
        right_answers=sum(answer_label for _, _, answer_label in answers),
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
