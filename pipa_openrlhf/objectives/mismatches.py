"""KTO's mismatched completions: every prompt with the answer to another problem.

They are fixed once per data set, so that the prior's log-probs of mismatches are cached like all others.
"""

from dataclasses import replace
from functools import cached_property

import numpy as np

from pipa_openrlhf.data.samples import KEY_TYPE, Sample, Samples, sequence_key

NEVER = np.iinfo(np.int64).max  # a size that fits nowhere


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
            sizes = np.where(scored > 0, responses, NEVER)
            partners[queries] = next_matches(problems, sizes, queries, max_len - prompt_lens[queries])
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


def next_matches(groups: np.ndarray, sizes: np.ndarray, queries: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """For each query the first element after it, cyclically, of another group and of a size up to its limit.

    A tree of blocks of 1, 2, 4, ... elements keeps the smallest size of each block, and the smallest of any group but
    that one's. All queries climb and descend it together, in time (elements + queries) x log(elements).

    Args:
        groups, sizes: [n] whole numbers from 0; the size NEVER fits nowhere.
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
        np.pad(sizes.astype(np.int64), (0, padding), constant_values=NEVER),
        np.full(len(groups) + padding, NEVER),
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
