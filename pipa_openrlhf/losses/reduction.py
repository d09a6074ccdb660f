"""How token losses become the loss of a global batch.

Every reduction is a weighted sum of token losses. The weights depend on counts of the whole global batch, so that the
sum over micro-batches and ranks is the same however the batch is cut.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchCounts:
    """Counts of one global batch, known before its first micro-batch."""

    sequences: int
    labelled_tokens: int
    sequences_with_right_tokens: int


def count_batch(label_masks: list[tuple[torch.Tensor, torch.Tensor]]) -> BatchCounts:
    """Counts from the (labels [T], mask [T]) of every sequence of a global batch."""
    return BatchCounts(
        sequences=len(label_masks),
        labelled_tokens=sum(int(mask.sum()) for _, mask in label_masks),
        sequences_with_right_tokens=sum(bool((labels * mask).any()) for labels, mask in label_masks),
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
