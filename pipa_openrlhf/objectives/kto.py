"""KTO and Step-KTO: the likelihood of the label under a prior on the negative conditional (appendix A.2 and B).

Their reference point is estimated on mismatched completions: every prompt with the answer to another problem. They are
fixed once per data set, so that the prior's log-probs of mismatches are cached like all others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch

from pipa_openrlhf.data.samples import KEY_TYPE, Sample, Samples, sequence_key
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.objective import (
    BY_KL,
    LIKELIHOOD,
    NEGATIVE,
    SEQUENCE,
    STEP,
    Answers,
    Objective,
    ObjectiveConfig,
    stop_gradient_where,
)
from pipa_openrlhf.settings import setting

_NEVER = np.iinfo(np.int64).max  # a size that fits nowhere


@dataclass(frozen=True)
class KtoConfig(ObjectiveConfig):
    """Settings of KTO and Step-KTO."""

    flag_group: ClassVar[str] = "kto"
    module: ClassVar[str] = "train_kto"
    hidden_groups: ClassVar[tuple[str, ...]] = ("value",)
    without_effect: ClassVar[tuple[str, ...]] = (
        *("model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
    )

    step_loss: str = setting(
        "l1",
        "l1: no gradient for right steps of a wrong answer; per_step: one term a step (with step annotation)",
        choices=("l1", "per_step"),
    )
    desirable_weight: float = setting(1.0, "weight of right answers, lambda_D", least=0)
    undesirable_weight: float = setting(1.0, "weight of wrong answers, lambda_U", least=0)
    sft_coef: float = setting(0.0, "weight of the NLL on right tokens (Table 4: 1.0)", least=0)

    def make_objective(self, config) -> Objective:
        """Step-KTO on step labels, or KTO."""
        weights = (config.model.beta, self.desirable_weight, self.undesirable_weight)
        objective = step_kto(self.step_loss, *weights) if config.data.annotation == "step" else kto(*weights)
        return replace(objective, sft_coef=self.sft_coef)

    def check(self, config) -> None:
        """Raises UserError."""
        if not config.model.beta > 0:
            raise UserError(f"--model.beta must be above 0, got {config.model.beta}")

    def idle_flags(self, config) -> list[str]:
        """Lines about flags that were set and change nothing."""
        if self.step_loss != KtoConfig.step_loss and config.data.annotation != "step":
            return ["--kto.step_loss has no effect without --data.annotation step"]
        return []


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """KTO."""
    return _kto("KTO", SEQUENCE, kto_answer_loss, beta, desirable_weight, undesirable_weight)


def step_kto(
    step_loss: str = "l1", beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Step-KTO, ``l1`` or ``per_step`` (appendix B)."""
    loss = {"l1": kto_l1_loss, "per_step": step_kto_loss}[step_loss]
    objective = _kto(f"Step-KTO ({step_loss})", STEP, loss, beta, desirable_weight, undesirable_weight)
    return replace(objective, needs_step_labels=True)


def _kto(
    name: str, level: str, loss: Callable, beta: float, desirable_weight: float, undesirable_weight: float
) -> Objective:
    weights = dict(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return Objective(
        name,
        NEGATIVE,
        BY_KL,
        LIKELIHOOD,
        level,
        answer_loss=partial(loss, **weights),
        needs_mismatched=True,
        reward_scale=beta,
        loss_at_prior=0.5 if loss is not step_kto_loss and desirable_weight == undesirable_weight == 1 else None,
    )


def kto_terms(
    log_ratio: torch.Tensor,
    label: torch.Tensor,
    z0: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """1 - sigmoid(beta (R - z0)) where the label is 1, 1 - sigmoid(beta (z0 - R)) where it is 0, weighted.

    Args:
        log_ratio: sums R of r_t, over an answer or over a step; any one shape.
        label: the same shape.
        z0: scalar without gradient.

    Returns:
        The same shape.
    """
    scaled = beta * (log_ratio - z0)
    desirable = desirable_weight * torch.sigmoid(-scaled)
    undesirable = undesirable_weight * torch.sigmoid(scaled)
    return torch.where(label != 0, desirable, undesirable)


def kto_answer_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """One KTO term an answer. Returns [B]."""
    return kto_terms(
        answers.log_ratio.sum(dim=1), answers.answer_label, answers.z0, beta, desirable_weight, undesirable_weight
    )


def kto_l1_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """L1-KTO: as KTO, but the right steps of a wrong answer get no gradient. Returns [B]."""
    right_steps_of_wrong = (answers.labels != 0) & (answers.answer_label == 0)[:, None]
    sums = stop_gradient_where(right_steps_of_wrong, answers.log_ratio).sum(dim=1)
    return kto_terms(sums, answers.answer_label, answers.z0, beta, desirable_weight, undesirable_weight)


def step_kto_loss(answers: Answers, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """Step-KTO: one KTO term a step, on the step's own sum of r_t and label, summed over an answer's steps.

    Steps without a token inside the mask have no term. Returns [B].
    """
    # Numbers of the steps that have tokens: some texts of steps give none, so that a step's own number may exceed T.
    is_first = answers.step_ids.diff(dim=1, prepend=answers.step_ids[:, :1]) != 0
    steps = is_first.cumsum(dim=1)

    def per_step(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values).scatter_add(1, steps, values)

    mask = answers.mask.to(answers.log_ratio.dtype)
    tokens = per_step(mask)
    right_tokens = per_step(mask * answers.labels)
    terms = kto_terms(
        per_step(answers.log_ratio), right_tokens, answers.z0, beta, desirable_weight, undesirable_weight
    )
    return (terms * (tokens > 0)).sum(dim=1)


class MismatchedCompletions(Samples):
    """Prompts of samples with the answers of others.

    Attributes:
        partners: [len(samples)] index of the sample whose answer each prompt has, -1 where it has none; those are
            left out of this list.
    """

    def __init__(self, samples: Samples, partners: np.ndarray):
        self._samples, self.partners = samples, partners
        self._own = np.flatnonzero(partners >= 0)
        self._others = partners[self._own]

    def __len__(self) -> int:
        return len(self._own)

    def one(self, index: int) -> Sample:
        return _mismatch(self._samples[int(self._own[index])], self._samples[int(self._others[index])])

    def tokens(self, index: int) -> np.ndarray:
        own, other = int(self._own[index]), int(self._others[index])
        prompt = self._samples.tokens(own)[: self._prompt_lens[own]]
        return np.concatenate([prompt, self._samples.tokens(other)[self._prompt_lens[other] :]])

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Places in this list of the mismatches of ``rows`` of the samples, of those that have one."""
        return np.searchsorted(self._own, rows[self.partners[rows] >= 0])

    def column(self, name: str) -> np.ndarray:
        if name == "sequence_key":
            return self._keys
        if name == "length":
            prompts = self._prompt_lens
            return (self._samples.column("length") - prompts)[self._others] + prompts[self._own]
        if name in ("prompt_len", "prompt_key"):
            return self._samples.column(name)[self._own]
        raise KeyError(name)

    def token_ids(self) -> np.ndarray:
        return self._samples.token_ids()

    @cached_property
    def _prompt_lens(self) -> np.ndarray:
        return self._samples.column("prompt_len")

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.fromiter(map(sequence_key, self), dtype=KEY_TYPE, count=len(self))


def mismatched_completions(samples: Samples, max_len: int) -> MismatchedCompletions:
    """For every sample its prompt with the answer of the next sample, cyclically, that is of another problem and fits.

    Fixed once per data set, so that the prior's log-probs of mismatches are cached like all others. None where no
    answer qualifies.
    """
    problems = samples.column("problem")
    prompt_lens = samples.column("prompt_len").astype(np.int64)
    responses = samples.column("length") - prompt_lens
    partners = np.full(len(samples), -1)
    for has_prompt in (True, False):
        queries = np.flatnonzero((prompt_lens > 0) == has_prompt)
        if len(queries):
            # Without a prompt nothing predicts an answer's first token, so another one must be inside the mask.
            scored = samples.column("loss_tokens" if has_prompt else "later_loss_tokens")
            sizes = np.where(scored > 0, responses, _NEVER)
            partners[queries] = _next_matches(problems, sizes, queries, max_len - prompt_lens[queries])
    return MismatchedCompletions(samples, partners)


def _mismatch(own: Sample, other: Sample) -> Sample:
    """The prompt of ``own`` with the answer of ``other``."""
    mask = other.mask.copy()
    if own.prompt_len == 0:
        mask[0] = 0  # nothing predicts the first token
    return replace(
        own,
        input_ids=np.concatenate([own.input_ids[: own.prompt_len], other.input_ids[other.prompt_len :]]),
        labels=other.labels,
        mask=mask,
        step_ids=other.step_ids,
        answer_label=other.answer_label,
        pair_id=None,
    )


def _next_matches(groups: np.ndarray, sizes: np.ndarray, queries: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """For each query the first element after it, cyclically, of another group and of a size up to its limit.

    A tree of blocks of 1, 2, 4, ... elements keeps the smallest size of each block, and the smallest of any group but
    that one's. All queries climb and descend it together, in time (elements + queries) x log(elements).

    Args:
        groups, sizes: [n] whole numbers from 0; the size _NEVER fits nowhere.
        queries: [m] indices of elements.
        limits: [m].

    Returns:
        [m] indices, -1 where there is none.
    """
    count = len(groups)
    tree = _build_tree(np.tile(groups, 2), np.tile(sizes, 2))  # twice around, so that no search wraps
    own = groups[queries]

    def matches(level: int, blocks: np.ndarray, who: np.ndarray) -> np.ndarray:
        group, smallest, smallest_of_others = tree[level]
        return np.where(group[blocks] != own[who], smallest[blocks], smallest_of_others[blocks]) <= limits[who]

    # Climb: everything before a query's block is ruled out. A left child's search is that of its parent.
    block = queries + 1
    found_at = np.full(len(queries), -1)
    for level in range(len(tree)):
        who = np.flatnonzero(found_at < 0)
        who = who[block[who] < len(tree[level][0])]
        checked = who if level == len(tree) - 1 else who[block[who] % 2 == 1]
        found = matches(level, block[checked], checked)
        found_at[checked[found]] = level
        block[checked[~found]] += 1
        block[found_at < 0] //= 2
    for level in range(len(tree) - 2, -1, -1):
        who = np.flatnonzero(found_at > level)
        block[who] *= 2
        block[who[~matches(level, block[who], who)]] += 1
    return np.where(found_at < 0, -1, block % count)


def _build_tree(groups: np.ndarray, sizes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per level: group of a block's smallest element, its size, and the smallest size of another group."""
    padding = (1 << (len(groups) - 1).bit_length()) - len(groups)
    level = (
        np.pad(groups.astype(np.int64), (0, padding), constant_values=-1),
        np.pad(sizes.astype(np.int64), (0, padding), constant_values=_NEVER),
        np.full(len(groups) + padding, _NEVER),
    )
    tree = [level]
    while len(level[0]) > 1:
        (group_l, small_l, others_l), (group_r, small_r, others_r) = (
            tuple(values[side::2] for values in level) for side in (0, 1)
        )
        left = small_l <= small_r
        same = group_l == group_r
        level = (
            np.where(left, group_l, group_r),
            np.where(left, small_l, small_r),
            np.where(
                same,
                np.minimum(others_l, others_r),
                np.where(left, np.minimum(others_l, small_r), np.minimum(small_l, others_r)),
            ),
        )
        tree.append(level)
    return tree
