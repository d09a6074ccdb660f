"""Which units (answers or pairs) each rank runs in each micro-batch of each optimizer step.

A global batch is a random set of prompts with their answers. Length never decides which units share a batch, as the
labels and the gradient of a batch of long answers differ from those of a batch of short ones; it only decides how a
batch is cut into micro-batches.

ZeRO's collectives run in step: at every micro-batch all ranks wait for the slowest. So micro-batches are made alike in
work, which attention's square adds to their tokens, and those that ranks run at the same time more so.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice

import numpy as np
import torch

from pipa_openrlhf.data.packing import PRECISION, pack
from pipa_openrlhf.data.prefixes import Branches, PrefixTree

# Most padding of a global batch, as a share of its tokens, where another cut can lower it.
MOST_PADDING = 0.05


@dataclass(frozen=True)
class UnitSizes:
    """What the tokens of units cost in one forward pass.

    Attributes:
        lengths: [num_units] tokens of a unit, of the longer answer of a pair.
        prompts: [num_units] number of each unit's prompt.
        layout: ``padded``: every unit costs as much as the longest beside it; ``packed``: its own length; ``shared``:
            the tokens that it adds to the prefix tree of those beside it.
        sequences_of: indices of units -> the tokens of their sequences, one after another, as many a unit; asked for
            in the shared layout only.
        unit_size: sequences of a unit.
        attention: work of a token for each token of its sequence, as a share of its other work.
    """

    lengths: np.ndarray
    prompts: np.ndarray
    layout: str
    sequences_of: Callable[[np.ndarray], list[np.ndarray]] = list
    unit_size: int = 1
    attention: float = 0.0

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest unit."""
        return int(self.lengths.max())

    def budget(self, micro_batch_size: int, max_tokens: int | None) -> int:
        """Tokens of a micro-batch, of a pair those of one of its answers: ``max_tokens``, or as many as
        ``micro_batch_size`` of the longest units have."""
        return micro_batch_size * self.longest if max_tokens is None else max_tokens // self.unit_size

    def line_up(self, units: np.ndarray) -> "Line":
        """``units`` longest first, in their order where lengths are equal; where prefixes are shared, units of one
        prompt side by side, in the order of a dictionary, placed by their mean length."""
        lengths = self.lengths[units]
        if self.layout != "shared":
            order = np.argsort(-lengths, kind="stable")
            return Line(units[order], lengths[order], self)
        tree = PrefixTree(self.sequences_of(units))
        first_ranks = np.array(tree.ranks[:: max(len(tree.ranks) // len(units), 1)])
        order = np.lexsort((first_ranks, *self._by_prompt(units)))
        return Line(units[order], lengths[order], self, tree, order)

    def in_order(self, units: np.ndarray) -> "Line":
        """``units`` as they come."""
        tree = PrefixTree(self.sequences_of(units)) if self.layout == "shared" else None
        return Line(units, self.lengths[units], self, tree, np.arange(len(units)))

    def stretches(self, units: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """``units`` in parts of ``size``, in the order of :meth:`line_up` but within a prompt, of which no tokens are
        asked for."""
        order = np.lexsort((-self.lengths[units], *self._by_prompt(units)))
        return (units[order[start : start + size]] for start in range(0, len(units), size))

    def _by_prompt(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[len(units)] sort keys, the last one first: a prompt's place among ``units``, its mean length."""
        _, first_place, prompts = np.unique(self.prompts[units], return_index=True, return_inverse=True)
        mean_lengths = np.bincount(prompts, self.lengths[units]) / np.bincount(prompts)
        return first_place[prompts], -mean_lengths[prompts]


@dataclass(frozen=True)
class Line:
    """Units in the order in which they are cut into micro-batches.

    Attributes:
        units: [n].
        lengths: [n], as in :class:`UnitSizes`.
        sizes: what they were taken from.
        tree: prefix tree of their sequences, as many a unit, in the shared layout.
        places: [n] of each unit among those that ``tree`` was made of.
    """

    units: np.ndarray
    lengths: np.ndarray
    sizes: UnitSizes
    tree: PrefixTree | None = None
    places: np.ndarray | None = None
    _seen: dict[int, tuple[list[tuple[float, float]], Iterator]] = field(default_factory=dict, repr=False)

    def fitting(self, start: int, budget: float, limit: float = math.inf) -> int:
        """How many units from ``start`` on come to no more than ``budget`` tokens and ``limit`` work together."""
        if self.tree is not None:
            fits = (tokens <= budget and work <= limit for tokens, work in self._shared_costs(start))
            return next((number for number, fit in enumerate(fits) if not fit), len(self.units) - start)
        taken = window = 64
        while taken == window:
            window *= 4
            tokens, work = self.costs(start, start + window)
            taken = int(min(tokens.searchsorted(budget, side="right"), work.searchsorted(limit, side="right")))
        return taken

    def costs(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """[end - start] tokens and work of a micro-batch of the unit at ``start``, of it and the next, and so on. They
        never fall; work is in tokens without attention."""
        if self.tree is not None:
            tokens, work = np.array(list(islice(self._shared_costs(start), end - start))).T
            return tokens, work
        lengths = self.lengths[start:end]
        attention = self.sizes.attention
        if self.sizes.layout == "packed":
            tokens = np.cumsum(lengths)
            return tokens, tokens + attention * np.cumsum(lengths.astype(np.float64) ** 2)
        longest = np.maximum.accumulate(lengths)
        tokens = np.arange(1, len(lengths) + 1) * longest
        return tokens, tokens * (1 + attention * longest)

    def work(self, part: slice) -> float:
        """Of the micro-batch that ``part`` of the line is."""
        return float(self.costs(part.start, part.stop)[1][-1])

    def _shared_costs(self, start: int) -> Iterator[tuple[float, float]]:
        """What :meth:`_grow` yields, each computed once: cuts of many limits begin at the same units."""
        if start not in self._seen:
            self._seen[start] = ([], self._grow(start))
        seen, more = self._seen[start]
        for number in count():
            if number == len(seen):
                if (costs := next(more, None)) is None:
                    return
                seen.append(costs)
            yield seen[number]

    def _grow(self, start: int) -> Iterator[tuple[float, float]]:
        """Tokens and work in the shared layout.

        Sequences of a shared row are padded inside attention only, which may come to twice its tokens. A pair counts
        by the mean of its answers, as it counts by one of them in the other layouts.
        """
        assert self.tree is not None and self.places is not None
        of_a_unit = self.sizes.unit_size
        branches, longest = Branches(self.tree), 0
        for number, place in enumerate(self.places[start:].tolist(), start=1):
            for sequence in range(place * of_a_unit, (place + 1) * of_a_unit):
                branches.add(sequence)
                longest = max(longest, self.tree.lengths[sequence])
            inside_attention = number * longest
            tokens = branches.size / of_a_unit
            yield max(tokens, inside_attention / 2), tokens + self.sizes.attention * inside_attention * longest


def gather(order: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """``order`` with the units of a prompt moved to the first of them; ``prompts`` [num_units] numbers them."""
    _, first_place, of_unit = np.unique(prompts[order], return_index=True, return_inverse=True)
    return order[np.argsort(first_place[of_unit], kind="stable")]


def global_batches(
    num_units: int, batch_size: int, seed: int, epoch: int, prompts: np.ndarray | None = None
) -> list[np.ndarray]:
    """The global batches of an epoch; the last one may be smaller. They do not depend on the number of ranks.

    Args:
        prompts: [num_units] given, the units of a prompt stay together, in random order of prompts; one prompt may
            go on in the next batch. Otherwise the order is that of OpenRLHF's DistributedSampler.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(num_units, generator=generator).numpy()
    if prompts is not None:
        order = gather(order, prompts)
    return [order[start : start + batch_size] for start in range(0, num_units, batch_size)]


def rank_micro_batches(
    batch: np.ndarray,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    sizes: UnitSizes | None = None,
    max_tokens: int | None = None,
    by_size: bool = True,
) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because ZeRO's collectives run in step; a rank without work has
    empty ones.

    Args:
        micro_batch_size: a micro-batch has at most the tokens of that many of the longest units; that many units where
            there are no ``sizes``.
        max_tokens: given, a micro-batch has at most that many in place of those; needs ``sizes``.
        by_size: units of similar length share a micro-batch, and ranks get micro-batches of similar size at the same
            time. Otherwise ranks take turns in the order of the batch, as in OpenRLHF, and each cuts its share as it
            comes.
    """
    if sizes is None:
        count = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
        share = batch[rank::world_size]
        return [share[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]
    budget = sizes.budget(micro_batch_size, max_tokens)
    if by_size:
        return balanced_micro_batches(batch, world_size, sizes, budget)[rank::world_size]
    lines = [sizes.in_order(share) for first in range(world_size) if len(share := batch[first::world_size])]
    cuts = [[line.units[part] for part in cut(line, budget)] for line in lines]
    mine = cuts[rank] if rank < len(cuts) else []
    return mine + [batch[:0]] * (max(map(len, cuts), default=0) - len(mine))


def balanced_micro_batches(batch: np.ndarray, world_size: int, sizes: UnitSizes, budget: int) -> list[np.ndarray]:
    """A global batch in micro-batches of similar work, at most ``budget`` tokens each, the heaviest first; a larger
    unit is alone. Those at k * world_size to (k + 1) * world_size run at the same time.

    Their number is a multiple of ``world_size``, the last ones empty if need be, and no larger than budget, ranks and
    ``MOST_PADDING`` ask for.
    """
    if not len(batch):
        return []
    if sizes.layout == "packed":
        # Nothing is lost where long units stand beside short ones, and much is won: any of them may fill a gap.
        units, lengths = np.asarray(batch), sizes.lengths[batch].astype(np.float64)
        each = lengths + sizes.attention * lengths**2
        packed = pack(lengths, each, budget, world_size)
        micro_batches, work = [units[part] for part in packed], [each[part].sum() for part in packed]
    else:
        line = sizes.line_up(np.asarray(batch))
        parts = _even_parts(line, budget, world_size)
        micro_batches, work = [line.units[part] for part in parts], [line.work(part) for part in parts]
    heaviest_first = [micro_batches[place] for place in np.argsort(-np.array(work), kind="stable")]
    return heaviest_first + [np.asarray(batch)[:0]] * (-len(micro_batches) % world_size)


def _even_parts(line: Line, budget: int, world_size: int) -> list[slice]:
    """The line in parts of similar work, see :func:`balanced_micro_batches`."""
    parts = cut(line, budget)
    number = world_size * math.ceil(len(parts) / world_size)
    while True:
        parts = _in_rounds(line, budget, number, world_size)
        if line.tree is not None or _padding(line, parts) <= MOST_PADDING or number >= len(line.units):
            return parts
        number = world_size * math.ceil(number * 1.25 / world_size + 1e-9)


def _in_rounds(line: Line, budget: int, number: int, world_size: int) -> list[slice]:
    """At most ``number`` parts of similar work; where the first unit alone is more, what runs beside it is too."""
    parts: list[slice] = []
    start = 0
    while start < len(line.units):
        left = number - len(parts)
        limit = _smallest_limit(line, budget, left, start)
        first = line.work(slice(start, start + 1))
        if first <= limit or left <= world_size:
            return parts + cut(line, budget, limit, start)
        parts += cut(line, budget, first, start)[:world_size]
        start = parts[-1].stop
    return parts


def cut(line: Line, budget: float, limit: float = math.inf, start: int = 0) -> list[slice]:
    """The line from ``start`` in parts of at most ``budget`` tokens and ``limit`` work; a larger unit is alone."""
    parts = []
    while start < len(line.units):
        end = start + max(line.fitting(start, budget, limit), 1)
        parts.append(slice(start, end))
        start = end
    return parts


def _smallest_limit(line: Line, budget: int, number: int, start: int) -> float:
    """Least work a micro-batch with which the line from ``start`` still fits into that many of them."""
    high = max(line.work(part) for part in cut(line, budget, start=start))
    low = high / number
    while high - low > PRECISION * high:
        limit = (low + high) / 2
        if len(cut(line, budget, limit, start)) <= number:
            high = limit
        else:
            low = limit
    return high


def _padding(line: Line, parts: list[slice]) -> float:
    padded = sum(line.costs(part.start, part.stop)[0][-1] for part in parts)
    return 1 - line.lengths.sum() / padded
