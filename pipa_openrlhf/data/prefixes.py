"""The prefix tree of sequences: what they have in common at their beginnings, how many tokens that leaves, and one row
that holds every common prefix once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

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
class KeyRow:
    """A shared row for a kernel that takes sequences of any length.

    The queries of a sequence are the tokens that it adds to the row, which stand side by side; its keys are all of its
    tokens. The last query sees every key, the one before it all but the last, and so on. Sequences that add nothing
    are left out.

    Attributes:
        index: [K] place in the row of every key, sequence after sequence in the order of their queries.
        query_ends, key_ends: [sequences + 1] int32, 0 and where the queries and the keys of each end.
        most_queries, most_keys: of one sequence.
    """

    index: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class SharedRow:
    """What the L tokens of a row stand for inside attention: B blocks, the longest of W tokens.

    A block is a sequence, which attends to what stands before, or a whole tree of sequences with a mask.

    Attributes:
        block_index: [B, W] place in the row of every token of every block, 0 where padded.
        row_index: [L] place in [B * W] where a token of the row occurs first.
        repeats: of every prefix that occurred before, stretch by stretch: begin and end of a stretch in the row, and
            the place in [B * W] where its copy begins.
        block_ends: [B, W] of every token of a tree, where in its block what follows from it ends; None: blocks are
            sequences.
        trees: the same row in blocks that are trees, where their square is less; None elsewhere.
        keys: the same row without blocks, of sequences.
    """

    block_index: torch.Tensor
    row_index: torch.Tensor
    repeats: tuple[tuple[int, int, int], ...] = ()
    block_ends: torch.Tensor | None = None
    trees: "SharedRow | None" = None
    keys: KeyRow | None = None

    @cached_property
    def visible(self) -> torch.Tensor | None:
        """[B, 1, W, W] bool, True where the first token of a tree attends to the second: to itself and what it follows
        from. None: blocks are sequences."""
        if self.block_ends is None:
            return None
        place = torch.arange(self.block_ends.shape[1], device=self.block_ends.device)
        return (place <= place[:, None]) & (place[:, None] < self.block_ends[:, None, None])


def share_prefixes(sequences: list[np.ndarray]) -> tuple[list[np.ndarray], SharedRow]:
    """Lay out the prefix trees of B sequences in one row, each of its L tokens once, tree after tree.

    Returns:
        Per sequence [length] the places of its tokens in the row, and the row.
    """
    width = max(map(len, sequences))
    padded = np.zeros((len(sequences), width), dtype=np.int64)
    places = [padded[:0, 0]] * len(sequences)
    row_index: list[np.ndarray] = []
    repeats: list[tuple[int, int, int]] = []
    starts: list[int] = []
    keys: list[tuple[int, np.ndarray]] = []
    ends = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    used, before = 0, padded[:0, 0]
    for number, shared in zip(*lexicographic(sequences)):
        if not shared and len(sequences[number]):
            starts.append(used)
        ends[before[shared:]] = used
        own = np.arange(shared, len(sequences[number]))
        repeats += _stretches(before[:shared], number * width)
        places[number] = before = np.concatenate([before[:shared], used - shared + own])
        padded[number, : len(before)] = before
        row_index.append(number * width + own)
        keys.append((len(own), before))
        used += len(own)
    ends[before] = used
    sizes = np.diff([*starts, used])
    is_less = len(sizes) * sizes.max(initial=0) ** 2 < len(sequences) * width**2
    trees = _in_trees(np.array(starts), sizes, ends[:used]) if is_less else None
    row_places = torch.from_numpy(np.concatenate(row_index))
    row = SharedRow(torch.from_numpy(padded), row_places, tuple(repeats), trees=trees, keys=_key_row(keys))
    return places, row


def _key_row(sequences: list[tuple[int, np.ndarray]]) -> KeyRow:
    """Of sequences in the order of the row: how many tokens each adds to it, and the places of all of its tokens."""
    sequences = [one for one in sequences if one[0]]
    query_sizes, key_sizes = [queries for queries, _ in sequences], [len(places) for _, places in sequences]
    return KeyRow(
        torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *(places for _, places in sequences)])),
        torch.tensor([0, *accumulate(query_sizes)], dtype=torch.int32),
        torch.tensor([0, *accumulate(key_sizes)], dtype=torch.int32),
        max(query_sizes, default=0),
        max(key_sizes, default=0),
    )


def _in_trees(starts: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> SharedRow:
    """The row with its trees as blocks.

    Args:
        starts, sizes: [number of trees] first place in the row, and tokens.
        ends: [L] of every token, the place in the row where what follows from it ends.
    """
    place = np.arange(sizes.max())
    own = place < sizes[:, None]
    index = np.where(own, starts[:, None] + place, 0)
    # Padding attends to itself, as a softmax over nothing is not a number.
    block_ends = np.where(own, ends[index] - starts[:, None], place + 1)
    row_index = torch.from_numpy(np.flatnonzero(own.ravel()))
    return SharedRow(torch.from_numpy(index), row_index, block_ends=torch.from_numpy(block_ends))


def _stretches(places: np.ndarray, copy: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of a row that ``places`` run through, as in ``SharedRow.repeats``; their copy begins at ``copy``."""
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    for start, end in zip(starts, [*starts[1:], len(places)]):
        yield int(places[start]), int(places[start] + end - start), copy + int(start)
