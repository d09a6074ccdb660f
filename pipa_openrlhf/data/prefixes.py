"""The prefix tree of sequences: what they have in common at their beginnings, how many tokens that leaves, and one row
that holds every common prefix once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


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


@dataclass(frozen=True)
class SharedRow:
    """What the L tokens of a row stand for, in which prefixes are shared: B sequences, the longest of W tokens.

    Attributes:
        sequence_index: [B, W] place in the row of every token of every sequence, 0 where padded.
        row_index: [L] place in [B * W] where a token of the row occurs first.
        repeats: of every prefix that occurred before, stretch by stretch: begin and end of a stretch in the row, and
            the place in [B * W] where its copy begins.
    """

    sequence_index: torch.Tensor
    row_index: torch.Tensor
    repeats: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedRow":
        """The same on ``device``."""
        sequence_index, row_index = (
            one.to(device, non_blocking=non_blocking) for one in (self.sequence_index, self.row_index)
        )
        return SharedRow(sequence_index, row_index, self.repeats)


def share_prefixes(sequences: list[np.ndarray]) -> tuple[list[np.ndarray], SharedRow]:
    """Lay out the prefix tree of B sequences in one row, each of its L tokens once.

    Returns:
        Per sequence [length] the places of its tokens in the row, and the row.
    """
    width = max(map(len, sequences))
    padded = np.zeros((len(sequences), width), dtype=np.int64)
    places = [padded[:0, 0]] * len(sequences)
    row_index: list[np.ndarray] = []
    repeats: list[tuple[int, int, int]] = []
    used, before = 0, padded[:0, 0]
    for number, shared in zip(*lexicographic(sequences)):
        own = np.arange(shared, len(sequences[number]))
        repeats += _stretches(before[:shared], number * width)
        places[number] = before = np.concatenate([before[:shared], used - shared + own])
        padded[number, : len(before)] = before
        row_index.append(number * width + own)
        used += len(own)
    return places, SharedRow(torch.from_numpy(padded), torch.from_numpy(np.concatenate(row_index)), tuple(repeats))


def _stretches(places: np.ndarray, copy: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of a row that ``places`` run through, as in ``SharedRow.repeats``; their copy begins at ``copy``."""
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    for start, end in zip(starts, [*starts[1:], len(places)]):
        yield int(places[start]), int(places[start] + end - start), copy + int(start)
