"""PIPA-M whose right tokens are clipped too: where F is above 1, they have no gradient. Not in the paper.

The paper clips wrong tokens alone; a right token whose F is no probability any more still pulls as hard as any other.
"""

from dataclasses import replace

import torch

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.objectives.objective import Objective
from pipa_openrlhf.objectives.pipa import pipa_m, pipa_m_token_loss


def make_objective(config: RunConfig) -> Objective:
    """For ``--pipa.objective_module``."""
    clip_eps = config.objective.clip_eps

    def token_loss(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        # The loss of a wrong token is never below 0, that of a right one where F > 1.
        return pipa_m_token_loss(log_f, log_p, u, label, clip_eps).clamp(min=0)

    return replace(pipa_m(clip_eps), name="PIPA-M, right tokens clipped", token_loss=token_loss)
