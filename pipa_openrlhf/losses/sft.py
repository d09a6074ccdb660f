"""Supervised fine-tuning: negative log-likelihood of the response."""

import torch


def sft_token_loss(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """-log f, whatever the prior, the value and the label. All [B, T], or any one shape."""
    return -log_f.float()
