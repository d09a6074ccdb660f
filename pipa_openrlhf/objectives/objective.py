"""What an objective is: its loss, what it needs of the trainer, and the settings that make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from pipa_openrlhf.config import RunConfig

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LogF = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MARGINAL, NEGATIVE, NONE = "marginal p(y|x)", "negative p(y|x,c=0)", "none"
LEARNED, HALF, BY_KL = "learned g", "1/2", "odds from KL"
LOG_LIKELIHOOD, LIKELIHOOD, PAIRWISE = "log-likelihood", "likelihood", "pairwise"
TOKEN, STEP, SEQUENCE = "token", "step", "sequence"
OUTSIDE = "outside the family"


@dataclass(frozen=True)
class Answers:
    """What the loss of whole answers sees: response tensors of B answers, aligned with each other.

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


@dataclass(frozen=True)
class Objective:
    """One row of the table. Exactly one of ``token_loss`` and ``answer_loss`` is set.

    Attributes:
        name: as tables, metrics and model cards show it.
        prior_constraint, class_prior, data_loss, level: the row's place in the paper's family.
        token_loss: elementwise ``(log_f, log_p, u, label) -> loss``, float32; see ``objectives/pipa.py``.
        answer_loss: ``Answers -> [B]`` losses, or [B / 2] where the objective needs pairs.
        needs_prior: whether ``log_p`` is read.
        needs_value_head: whether ``u`` is read.
        needs_pairs: the unit of a batch is a pair, chosen before rejected.
        needs_mismatched: z0 is estimated from the log-ratios of mismatched completions.
        needs_step_labels: meaningless with answer-level labels.
        reward_scale: rewards are this times the sum of r_t.
        log_F: elementwise ``(log_f, log_p, u) -> log p(c_t = 1 | x, y_<=t)``, for metrics.
        is_clipped: elementwise ``log_F -> bool``, tokens whose wrong-label loss is clipped.
        loss_at_prior: loss of a token, or of an answer or pair, where the policy is its own prior and g is 1/2; None
            where that is not one number.
        reduction: of token losses, see ``objectives/batch_loss.py``.
        sft_coef: weight of the NLL of right tokens (Table 4).
        nll_coef: weight of the NLL of chosen answers, OpenRLHF's ``--model.nll_loss_coef``.
        fixed_value: g in place of the value head (Table 2).
        keep: answer labels that are trained on.
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
    loss_at_prior: float | None = None
    reduction: str = "sum"
    sft_coef: float = 0.0
    nll_coef: float = 0.0
    fixed_value: float | None = None
    keep: str = "all"

    @property
    def learns_value(self) -> bool:
        """Whether the policy gets a value head."""
        return self.needs_value_head and self.fixed_value is None


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of a family of objectives: a subclass's fields are its flags, ``--<flag_group>.<field>``.

    Attributes:
        flag_group: prefix of its flags, and its name in the table.
        module: the entry point that trains it.
        hidden_groups: groups of ``RunConfig`` that it has no use for.
        without_effect: flags that OpenRLHF's ``train_dpo`` has and that change nothing here.
    """

    flag_group: ClassVar[str] = "objective"
    module: ClassVar[str] = "train"
    hidden_groups: ClassVar[tuple[str, ...]] = ()
    without_effect: ClassVar[tuple[str, ...]] = ()

    def make_objective(self, config: "RunConfig") -> Objective:
        """The objective that a run's settings describe."""
        raise NotImplementedError

    def check(self, config: "RunConfig") -> None:
        """Refuse settings that do not go together.

        Raises:
            UserError: names the flag and the way out.
        """

    def idle_flags(self, config: "RunConfig") -> list[str]:
        """Lines about flags that were set and change nothing."""
        return []
