"""The table of objectives. The trainer reads what an objective needs and never asks for its name."""

from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch

from pipa_openrlhf.losses.pipa import (
    pipa_m_is_clipped,
    pipa_m_log_F,
    pipa_m_token_loss,
    pipa_n_log_F,
    pipa_n_token_loss,
)
from pipa_openrlhf.losses.sft import sft_token_loss

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LogF = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """A token-separable objective: the loss of a global batch is a weighted sum of token losses.

    Attributes:
        name: as metrics and model cards show it.
        token_loss: elementwise ``(log_f, log_p, u, label) -> loss``, float32; see ``losses/pipa.py``.
        needs_prior: whether ``log_p`` is read.
        needs_value_head: whether ``u`` is read.
        log_F: elementwise ``(log_f, log_p, u) -> log p(c_t = 1 | x, y_<=t)``, for metrics; None where it has no
            meaning.
        is_clipped: elementwise ``log_F -> bool``, tokens whose wrong-label loss is clipped; None where none is.
    """

    name: str
    token_loss: TokenLoss
    needs_prior: bool
    needs_value_head: bool
    log_F: LogF | None = None
    is_clipped: Callable[[torch.Tensor], torch.Tensor] | None = None


def pipa_m(clip_eps: float = 1e-10) -> Objective:
    """PIPA-M: prior on the marginal (section 2.2)."""
    return Objective(
        name="PIPA-M",
        token_loss=partial(pipa_m_token_loss, clip_eps=clip_eps),
        needs_prior=True,
        needs_value_head=True,
        log_F=pipa_m_log_F,
        is_clipped=partial(pipa_m_is_clipped, clip_eps=clip_eps),
    )


PIPA_N = Objective(
    name="PIPA-N",
    token_loss=pipa_n_token_loss,
    needs_prior=True,
    needs_value_head=True,
    log_F=pipa_n_log_F,
)
SFT = Objective(name="SFT", token_loss=sft_token_loss, needs_prior=False, needs_value_head=False)
