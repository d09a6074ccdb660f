"""The prefix tree of sequences: what they have in common at their beginnings, and how many tokens that leaves."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def lexicographic(sequences: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Sequences of token ids in the order of a dictionary, which is a walk through their prefix tree.

    Returns:
        Their indices in that order, and for each how many of its first tokens are those of the one before it. All
        that a sequence shares with any earlier one it shares with the one before.
    """
    # Bytes of fixed width, highest first, compare as the ids do, and much faster than ids one by one.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [common_prefix(sequences[before], sequences[here]) for before, here in zip(order, order[1:])]
    return order, [0, *shared][: len(order)]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many of their first values two arrays have in common."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


class PrefixTree:
    """Sizes of the prefix trees of some of N sequences; no tokens are kept.

    Args:
        sequences: token ids of each.
    """

    def __init__(self, sequences: Sequence[np.ndarray]):
        order, shared = lexicographic(sequences)
        self.lengths = [len(ids) for ids in sequences]
        self.ranks = np.argsort(order).tolist()
        # Level k holds at i the least of shared[i : i + 2**k]: two of them cover any stretch.
        self._least = [np.array(shared, dtype=np.int64)]
        while len(self._least[-1]) > (width := 2 ** (len(self._least) - 1)):
            last = self._least[-1]
            self._least.append(np.minimum(last[:-width], last[width:]))
        self._least = [level.tolist() for level in self._least]

    def common(self, low: int, high: int) -> int:
        """How many of their first tokens the sequences of two ranks share, the lower rank first."""
        level = (high - low).bit_length() - 1
        least = self._least[level]
        return min(least[low + 1], least[high + 1 - (1 << level)])


class Branches:
    """A part of a :class:`PrefixTree` to which sequences are added one by one.

    Attributes:
        size: its tokens.
    """

    def __init__(self, tree: PrefixTree):
        self.size = 0
        self._tree = tree
        self._ranks: list[int] = []

    def add(self, sequence: int) -> None:
        """Add the sequence of that number."""
        rank, ranks = self._tree.ranks[sequence], self._ranks
        place = bisect_left(ranks, rank)
        before = self._tree.common(ranks[place - 1], rank) if place else 0
        after = self._tree.common(rank, ranks[place]) if place < len(ranks) else 0
        self.size += self._tree.lengths[sequence] - max(before, after)
        insort(ranks, rank)
