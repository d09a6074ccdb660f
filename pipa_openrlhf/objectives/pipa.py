"""PIPA-M and PIPA-N: maximum likelihood of token labels under a prior constraint (paper, Algorithm 1).

Everything here is elementwise over response tokens and float32 in log space. With

- ``log_f``: log f(y_t | x, y_<t) of the policy, which models p(y_t | x, y_<t, c_t = 1);
- ``log_p``: log-prob of the same token under the frozen prior;
- ``u``: the value head's logit, g = sigmoid(u) = p(c_t = 1 | x, y_<t);

F is the model's probability that token t is right, p(c_t = 1 | x, y_<=t).
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.objective import (
    LEARNED,
    LOG_LIKELIHOOD,
    MARGINAL,
    NEGATIVE,
    TOKEN,
    Objective,
    ObjectiveConfig,
)
from pipa_openrlhf.settings import by_content, setting


@dataclass(frozen=True)
class PipaConfig(ObjectiveConfig):
    """Settings of PIPA, and of an objective from a user's own file."""

    flag_group: ClassVar[str] = "pipa"
    module: ClassVar[str] = "train_pipa"
    without_effect: ClassVar[tuple[str, ...]] = (
        *("model.beta", "model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
    )

    variant: str = setting("m", "prior on the marginal (m) or negative (n)", choices=("m", "n"))
    loss_reduction: str = setting(
        "sum", "how token losses become the loss of a global batch", choices=("sum", "token_mean", "sequence_mean")
    )
    clip_eps: float = setting(1e-10, "PIPA-M: F of wrong tokens is clipped to 1 - eps", above=0, below=1)
    fixed_value: float | None = setting(None, "use this g in place of the value head (Table 2: 0.5)", above=0, below=1)
    sft_coef: float = setting(0.0, "weight of the NLL on right tokens (Table 4: 1.0)", least=0)
    beta: float = setting(
        1.0,
        "not in the paper: F takes the policy's ratio to the prior to this power; below 1 the policy goes beyond the "
        "paper's target (docs/study.md)",
        above=0,
    )
    objective_module: str | None = by_content(
        None, "Python file that defines `make_objective(config)`; its objective replaces PIPA's", is_path=True
    )

    def make_objective(self, config) -> Objective:
        """PIPA-M, PIPA-N, or the objective of the user's file."""
        if self.objective_module:
            from pipa_openrlhf.objectives.table import load_objective

            objective = load_objective(self.objective_module, config)
        else:
            objective = sharpened(pipa_m(self.clip_eps) if self.variant == "m" else pipa_n(), self.beta)
        return replace(objective, reduction=self.loss_reduction, sft_coef=self.sft_coef, fixed_value=self.fixed_value)

    def check(self, config) -> None:
        """Raises UserError."""
        if self.objective_module and not config.model.beta > 0:
            raise UserError(f"--model.beta must be above 0, got {config.model.beta}")
        value = config.value
        if self.fixed_value is not None:
            for name in ("hidden_size", "lr", "init_from"):
                if getattr(value, name) is not None:
                    raise UserError(f"--pipa.fixed_value replaces the value head: leave out --value.{name}")
        if value.init_from is not None:
            if value.hidden_size is not None:
                raise UserError("--value.init_from brings its own size: leave out --value.hidden_size")
            if not os.path.isfile(os.path.join(value.init_from, "value_head.safetensors")):
                raise UserError(f"--value.init_from {value.init_from}: no value_head.safetensors there")

    def idle_flags(self, config) -> list[str]:
        """Lines about flags that were set and change nothing."""
        if not self.objective_module:
            return []
        idle = [name for name in ("variant", "beta") if getattr(self, name) != getattr(PipaConfig, name)]
        return [f"--pipa.{name} has no effect with --pipa.objective_module" for name in idle]


def pipa_m(clip_eps: float = 1e-10) -> Objective:
    """Prior on the marginal p(y|x)."""
    return Objective(
        "PIPA-M",
        MARGINAL,
        LEARNED,
        LOG_LIKELIHOOD,
        TOKEN,
        token_loss=partial(pipa_m_token_loss, clip_eps=clip_eps),
        needs_value_head=True,
        log_F=pipa_m_log_F,
        is_clipped=partial(pipa_m_is_clipped, clip_eps=clip_eps),
        loss_at_prior=math.log(2),
    )


def pipa_n() -> Objective:
    """Prior on the negative conditional p(y|x, c=0)."""
    return Objective(
        "PIPA-N",
        NEGATIVE,
        LEARNED,
        LOG_LIKELIHOOD,
        TOKEN,
        token_loss=pipa_n_token_loss,
        needs_value_head=True,
        log_F=pipa_n_log_F,
        loss_at_prior=math.log(2),
    )


def sharpened(objective: Objective, beta: float) -> Objective:
    """An extension that the paper does not have: (f / p)^beta in the place of f / p in F.

    The policy that PIPA-M aims at is proportional to p(y|x) (p(c=1|x,y) / g)^(1/beta), and likewise for PIPA-N with
    odds in the place of shares: sharper than the paper's for beta below 1. ``beta`` 1 changes nothing.
    """
    token_loss, log_F = objective.token_loss, objective.log_F
    assert token_loss is not None and log_F is not None  # a PIPA objective has both

    def scaled(log_f: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return torch.lerp(log_p.float(), log_f.float(), beta)

    if beta == 1:
        return objective
    return replace(
        objective,
        token_loss=lambda log_f, log_p, u, label: token_loss(scaled(log_f, log_p), log_p, u, label),
        log_F=lambda log_f, log_p, u: log_F(scaled(log_f, log_p), log_p, u),
        reward_scale=beta,
    )


def pipa_m_log_F(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """log F = log f - log p + log g, prior on the marginal p(y|x) (section 2.2). Not clipped: F may exceed 1.

    Args:
        log_f, log_p, u: any one shape, usually [B, T].

    Returns:
        The same shape, float32.
    """
    return log_f.float() - log_p.float() + logsigmoid(u.float())


def pipa_n_log_F(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """log F = logsigmoid(log f - log p + u), prior on the negative conditional p(y|x, c=0) (section 2.4).

    Args and result as in :func:`pipa_m_log_F`.
    """
    return logsigmoid(log_f.float() - log_p.float() + u.float())


def pipa_m_token_loss(
    log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor, label: torch.Tensor, clip_eps: float = 1e-10
) -> torch.Tensor:
    """-log F where the label is 1; -log(1 - F) with F clipped to 1 - clip_eps where it is 0.

    A clipped token has loss -log(clip_eps) and no gradient. The loss of a right token is negative where F > 1.

    Args:
        log_f, log_p, u: [B, T], or any one shape.
        label: the same shape, 1 for right and 0 for wrong tokens, any dtype.
        clip_eps: the paper's epsilon.

    Returns:
        Token losses, float32, the same shape.
    """
    log_F = pipa_m_log_F(log_f, log_p, u)
    clipped = pipa_m_is_clipped(log_F, clip_eps)
    # Both branches must stay finite everywhere: a where() passes NaN gradients of the branch it does not take.
    log_F_below_clip = torch.where(clipped | (label != 0), torch.full_like(log_F, -1.0), log_F)
    wrong = torch.where(clipped, torch.full_like(log_F, -math.log(clip_eps)), -log1mexp(log_F_below_clip))
    return torch.where(label != 0, -log_F, wrong)


def pipa_n_token_loss(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the label under F = sigmoid(log f - log p + u).

    Args and result as in :func:`pipa_m_token_loss`.
    """
    score = log_f.float() - log_p.float() + u.float()
    return -logsigmoid(torch.where(label != 0, score, -score))


def pipa_m_is_clipped(log_F: torch.Tensor, clip_eps: float) -> torch.Tensor:
    """True where F exceeds 1 - clip_eps; log(1 - eps) is -eps to float32 precision, while 1 - 1e-10 is just 1."""
    return log_F > -clip_eps


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012)."""
    near_zero = x > -math.log(2)
    far = torch.where(near_zero, torch.full_like(x, -1.0), x)
    near = torch.where(near_zero, x, torch.full_like(x, -1.0))
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
