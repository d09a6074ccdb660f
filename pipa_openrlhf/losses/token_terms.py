"""A token-separable loss over the labelled tokens of a micro-batch, flat."""

from dataclasses import dataclass

import torch

from pipa_openrlhf.losses.objectives import TokenLoss


@dataclass(frozen=True)
class TokenTerms:
    """sum over tokens of weight x token loss + nll_weight x -log f, for N tokens.

    Because it is a sum over tokens, it can be evaluated on any slice of them, and its gradient with respect to the
    hidden states can be formed while the logits of that slice are alive.

    Attributes:
        token_loss: elementwise, see ``losses/pipa.py``.
        log_p, labels, weights, nll_weights: [N].
    """

    token_loss: TokenLoss
    log_p: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    nll_weights: torch.Tensor

    def loss(self, log_f: torch.Tensor, u: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Scalar loss of the tokens in ``part``; ``log_f`` and ``u`` are theirs, [n]."""
        token_loss = self.token_loss(log_f, self.log_p[part], u, self.labels[part])
        return (token_loss * self.weights[part] - self.nll_weights[part] * log_f).sum()
