"""Supervised fine-tuning, and the priors of Table 3: negative log-likelihood of the response."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pipa_openrlhf.objectives.objective import NONE, TOKEN, Objective, ObjectiveConfig
from pipa_openrlhf.settings import by_content


@dataclass(frozen=True)
class SftConfig(ObjectiveConfig):
    """Settings of supervised fine-tuning."""

    flag_group: ClassVar[str] = "sft"
    module: ClassVar[str] = "train_sft"
    hidden_groups: ClassVar[tuple[str, ...]] = ("prior", "value")
    without_effect: ClassVar[tuple[str, ...]] = (
        *("model.beta", "model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
        "ref.model_name_or_path",
    )

    keep: str = by_content(
        "positive",
        "answers to train on; all and negative make the priors of Table 3",
        choices=("positive", "negative", "all"),
        flag="data.keep",
    )

    def make_objective(self, config) -> Objective:
        """SFT on the kept answers."""
        return replace(sft(), keep=self.keep)


def sft() -> Objective:
    """-log f, as a mean over all tokens of the global batch."""
    return Objective(
        "SFT",
        NONE,
        NONE,
        "log-likelihood of y",
        TOKEN,
        token_loss=sft_token_loss,
        needs_prior=False,
        reduction="token_mean",
    )


def sft_token_loss(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """-log f, whatever the prior, the value and the label. All [B, T], or any one shape."""
    return -log_f.float()
