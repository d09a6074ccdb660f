"""KTO's mismatched completions: every prompt with the answer to another problem.

They are fixed once per data set, so that the prior's log-probs of mismatches are cached like all others.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipa_openrlhf.data.tokenise import Sample

NEVER = np.iinfo(np.int64).max  # a size that fits nowhere


def mismatched_completions(samples: "list[Sample]", max_len: int) -> "tuple[Sample | None, ...]":
    """For every sample its prompt with the answer of the next sample, cyclically, that is of another problem and fits.

    Fixed once per data set, so that the prior's log-probs of mismatches are cached like all others. None where no
    answer qualifies.
    """
    numbers: dict[str, int] = {}
    problems = np.array([numbers.setdefault(one.problem_id, len(numbers)) for one in samples], dtype=np.int64)
    prompt_lens = np.array([one.prompt_len for one in samples], dtype=np.int64)
    partners = np.full(len(samples), -1)
    for has_prompt in (True, False):
        # Without a prompt nothing predicts an answer's first token, so another one must be inside the mask.
        usable = [one.mask[0 if has_prompt else 1 :].any() for one in samples]
        sizes = np.array([len(one.labels) if fits else NEVER for one, fits in zip(samples, usable)], dtype=np.int64)
        queries = np.flatnonzero((prompt_lens > 0) == has_prompt)
        if len(queries):
            partners[queries] = next_matches(problems, sizes, queries, max_len - prompt_lens[queries])
    return tuple(
        None if partner < 0 else _mismatch(own, samples[partner]) for own, partner in zip(samples, partners.tolist())
    )


def _mismatch(own: "Sample", other: "Sample") -> "Sample":
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
