"""The table of objectives: the paper's unification, and what the trainer must provide for each.

Every preference objective here estimates p(c | x, y) or compares two answers, under a prior constraint. The rows
differ in what the prior is put on, in what is assumed of p(c | x), and in the loss on the data. The trainer reads what
an objective needs and never asks for its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pipa_openrlhf.losses.answers import Answers
from pipa_openrlhf.losses.dpo import dpo_loss, ipo_loss, pair_sums, step_pair_sums_l0, step_pair_sums_l1
from pipa_openrlhf.losses.kto import kto_answer_loss, kto_l1_loss, step_kto_loss
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

MARGINAL, NEGATIVE, NONE = "marginal p(y|x)", "negative p(y|x,c=0)", "none"
LEARNED, HALF, BY_KL = "learned g", "1/2", "odds from KL"
LOG_LIKELIHOOD, LIKELIHOOD, PAIRWISE = "log-likelihood", "likelihood", "pairwise"
TOKEN, STEP, SEQUENCE = "token", "step", "sequence"
OUTSIDE = "outside the family"


@dataclass(frozen=True)
class Objective:
    """One row of the table. Exactly one of ``token_loss`` and ``answer_loss`` is set.

    Attributes:
        name: as tables, metrics and model cards show it.
        prior_constraint, class_prior, data_loss, level: the row's place in the paper's family.
        token_loss: elementwise ``(log_f, log_p, u, label) -> loss``, float32; see ``losses/pipa.py``.
        answer_loss: ``Answers -> [B]`` losses, or [B / 2] where the objective needs pairs.
        needs_prior: whether ``log_p`` is read.
        needs_value_head: whether ``u`` is read.
        needs_pairs: the unit of a batch is a pair, chosen before rejected.
        needs_mismatched: z0 is estimated from the log-ratios of mismatched completions.
        needs_step_labels: meaningless with answer-level labels.
        reward_scale: rewards are this times the sum of r_t.
        log_F: elementwise ``(log_f, log_p, u) -> log p(c_t = 1 | x, y_<=t)``, for metrics.
        is_clipped: elementwise ``log_F -> bool``, tokens whose wrong-label loss is clipped.
    """

    name: str
    prior_constraint: str
    class_prior: str
    data_loss: str
    level: str
    token_loss: TokenLoss | None = None
    answer_loss: Callable[[Answers], torch.Tensor] | None = None
    needs_prior: bool = True
    needs_value_head: bool = False
    needs_pairs: bool = False
    needs_mismatched: bool = False
    needs_step_labels: bool = False
    reward_scale: float = 1.0
    log_F: LogF | None = None
    is_clipped: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class ObjectiveSettings:
    """Hyper-parameters of the rows; the defaults are the paper's."""

    clip_eps: float = 1e-10
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def objectives(settings: ObjectiveSettings = ObjectiveSettings()) -> dict[str, Objective]:
    """The table, by the key that command lines use."""
    beta = settings.beta
    kto_weights = dict(
        beta=beta, desirable_weight=settings.desirable_weight, undesirable_weight=settings.undesirable_weight
    )

    def pairwise(loss: Callable, sums: Callable = pair_sums) -> Callable[[Answers], torch.Tensor]:
        return lambda answers: loss(*sums(answers))

    dpo = partial(dpo_loss, beta=beta, label_smoothing=settings.label_smoothing)
    smoothed = settings.label_smoothing > 0
    dpo_place = (OUTSIDE, OUTSIDE, "pairwise, smoothed") if smoothed else (NEGATIVE, HALF, PAIRWISE)
    pairs = dict(needs_pairs=True, reward_scale=beta)
    kto = dict(needs_mismatched=True, reward_scale=beta)
    return {
        "pipa_m": Objective(
            "PIPA-M",
            MARGINAL,
            LEARNED,
            LOG_LIKELIHOOD,
            TOKEN,
            token_loss=partial(pipa_m_token_loss, clip_eps=settings.clip_eps),
            needs_value_head=True,
            log_F=pipa_m_log_F,
            is_clipped=partial(pipa_m_is_clipped, clip_eps=settings.clip_eps),
        ),
        "pipa_n": Objective(
            "PIPA-N",
            NEGATIVE,
            LEARNED,
            LOG_LIKELIHOOD,
            TOKEN,
            token_loss=pipa_n_token_loss,
            needs_value_head=True,
            log_F=pipa_n_log_F,
        ),
        "dpo": Objective("DPO", *dpo_place, SEQUENCE, answer_loss=pairwise(dpo), **pairs),
        "step_dpo_l1": Objective(
            "Step-DPO (l1)",
            *dpo_place,
            STEP,
            answer_loss=pairwise(dpo, step_pair_sums_l1),
            needs_step_labels=True,
            **pairs,
        ),
        "step_dpo_l0": Objective(
            "Step-DPO (l0)",
            *dpo_place,
            STEP,
            answer_loss=pairwise(dpo, step_pair_sums_l0),
            needs_step_labels=True,
            **pairs,
        ),
        "ipo": Objective(
            "IPO",
            OUTSIDE,
            OUTSIDE,
            "squared margin",
            SEQUENCE,
            answer_loss=pairwise(partial(ipo_loss, beta=beta)),
            **pairs,
        ),
        "kto": Objective(
            "KTO", NEGATIVE, BY_KL, LIKELIHOOD, SEQUENCE, answer_loss=partial(kto_answer_loss, **kto_weights), **kto
        ),
        "step_kto_l1": Objective(
            "Step-KTO (l1)",
            NEGATIVE,
            BY_KL,
            LIKELIHOOD,
            STEP,
            answer_loss=partial(kto_l1_loss, **kto_weights),
            needs_step_labels=True,
            **kto,
        ),
        "step_kto_per_step": Objective(
            "Step-KTO (per_step)",
            NEGATIVE,
            BY_KL,
            LIKELIHOOD,
            STEP,
            answer_loss=partial(step_kto_loss, **kto_weights),
            needs_step_labels=True,
            **kto,
        ),
        "sft": Objective(
            "SFT", NONE, NONE, "log-likelihood of y", TOKEN, token_loss=sft_token_loss, needs_prior=False
        ),
    }
