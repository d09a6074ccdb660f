"""PIPA-M and PIPA-N: maximum likelihood of token labels under a prior constraint (paper, Algorithm 1).

Everything here is elementwise over response tokens and float32 in log space. With

- ``log_f``: log f(y_t | x, y_<t) of the policy, which models p(y_t | x, y_<t, c_t = 1);
- ``log_p``: log-prob of the same token under the frozen prior;
- ``u``: the value head's logit, g = sigmoid(u) = p(c_t = 1 | x, y_<t);

F is the model's probability that token t is right, p(c_t = 1 | x, y_<=t).
"""

import math

import torch
import torch.nn.functional as F


def pipa_m_log_F(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """log F = log f - log p + log g, prior on the marginal p(y|x) (section 2.2). Not clipped: F may exceed 1.

    Args:
        log_f, log_p, u: any one shape, usually [B, T].

    Returns:
        The same shape, float32.
    """
    return log_f.float() - log_p.float() + F.logsigmoid(u.float())


def pipa_n_log_F(log_f: torch.Tensor, log_p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """log F = logsigmoid(log f - log p + u), prior on the negative conditional p(y|x, c=0) (section 2.4).

    Args and result as in :func:`pipa_m_log_F`.
    """
    return F.logsigmoid(log_f.float() - log_p.float() + u.float())


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
    return -F.logsigmoid(torch.where(label != 0, score, -score))


def pipa_m_is_clipped(log_F: torch.Tensor, clip_eps: float) -> torch.Tensor:
    """True where F exceeds 1 - clip_eps; log(1 - eps) is -eps to float32 precision, while 1 - 1e-10 is just 1."""
    return log_F > -clip_eps


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012)."""
    near_zero = x > -math.log(2)
    far = torch.where(near_zero, torch.full_like(x, -1.0), x)
    near = torch.where(near_zero, x, torch.full_like(x, -1.0))
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
