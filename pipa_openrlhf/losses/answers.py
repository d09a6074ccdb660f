"""What the loss of whole answers sees of a micro-batch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Answers:
    """Response tensors of B answers, aligned with each other.

    Attributes:
        log_ratio: [B, T] float32, r_t = log f_t - log p_t; 0 outside the mask.
        labels, mask, step_ids: [B, T], label, loss mask and step number of every response token.
        answer_label: [B], 1 for right answers. In paired data rows alternate: chosen, rejected, chosen, ...
        z0: scalar, KTO's reference point of the global batch; 0 for other objectives.
    """

    log_ratio: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    step_ids: torch.Tensor
    answer_label: torch.Tensor
    z0: torch.Tensor


def stop_gradient_where(condition: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` unchanged, without gradient where ``condition`` holds (the sg of appendix B). Same shapes."""
    return torch.where(condition, values.detach(), values)
