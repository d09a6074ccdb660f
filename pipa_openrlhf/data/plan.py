"""Which units (answers or pairs) each rank runs in each micro-batch of each optimizer step.

A global batch is a random set of prompts with their answers. Length never decides which units share a batch, as the
labels and the gradient of a batch of long answers differ from those of a batch of short ones; it only decides how a
batch is cut into micro-batches.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

# Most padding of a global batch, as a share of its tokens, where another cut can lower it.
MOST_PADDING = 0.05


@dataclass(frozen=True)
class UnitSizes:
    """What the tokens of units cost in one forward pass.

    Attributes:
        lengths: [num_units] tokens of a unit, of the longer answer of a pair.
        prompts: [num_units] number of each unit's prompt.
        prompt_lengths: [num_units] tokens that units of one prompt share.
        layout: ``padded``: every unit costs as much as the longest beside it; ``packed``: its own length; ``shared``:
            its own length, and each prompt once.
    """

    lengths: np.ndarray
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    layout: str

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest unit."""
        return int(self.lengths.max())

    def sort(self, units: np.ndarray) -> np.ndarray:
        """Longest first, in their order where lengths are equal; where prompts are shared, units of one prompt side
        by side, placed by their mean length."""
        lengths = self.lengths[units]
        if self.layout != "shared":
            return units[np.argsort(-lengths, kind="stable")]
        _, first_place, prompts = np.unique(self.prompts[units], return_index=True, return_inverse=True)
        mean_lengths = np.bincount(prompts, lengths) / np.bincount(prompts)
        return units[np.lexsort((-lengths, first_place[prompts], -mean_lengths[prompts]))]

    def costs(self, units: np.ndarray) -> np.ndarray:
        """[len(units)] tokens of a micro-batch of the first unit, of the first two, and so on, never falling.

        Sequences of a shared row are padded inside attention only, which may come to twice its tokens.
        """
        lengths = self.lengths[units]
        padded = np.arange(1, len(units) + 1) * np.maximum.accumulate(lengths)
        if self.layout == "padded":
            return padded
        if self.layout == "packed":
            return np.cumsum(lengths)
        prompts = self.prompts[units]
        repeated = np.concatenate([[False], prompts[1:] == prompts[:-1]])
        return np.maximum(np.cumsum(lengths - repeated * self.prompt_lengths[units]), np.ceil(padded / 2))


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
    batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int, sizes: UnitSizes | None = None
) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because ZeRO's collectives run in step; a rank without work has
    empty ones.

    Args:
        micro_batch_size: a micro-batch has at most the tokens of that many of the longest units, or that many units
            where there are no ``sizes``.
        sizes: given, units of similar length share a micro-batch, and ranks get micro-batches of similar size at the
            same time. Otherwise ranks take turns in the order of the batch, as in OpenRLHF.
    """
    if sizes is not None:
        return balanced_micro_batches(batch, world_size, sizes, micro_batch_size * sizes.longest)[rank::world_size]
    count = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    share = batch[rank::world_size]
    return [share[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]


def balanced_micro_batches(batch: np.ndarray, world_size: int, sizes: UnitSizes, budget: int) -> list[np.ndarray]:
    """A global batch in micro-batches of similar cost, at most ``budget`` tokens each; a larger unit is alone.

    Their number is a multiple of ``world_size``, the last ones empty if need be, and no larger than budget, ranks and
    ``MOST_PADDING`` ask for.
    """
    if not len(batch):
        return []
    units = sizes.sort(np.asarray(batch))
    count = world_size * math.ceil(len(cut(units, sizes, budget)) / world_size)
    while True:
        micro_batches = cut(units, sizes, _smallest_limit(units, sizes, budget, count))
        if sizes.layout != "padded" or _padding(micro_batches, sizes) <= MOST_PADDING or count >= len(units):
            break
        count = world_size * math.ceil(count * 1.25 / world_size + 1e-9)
    return micro_batches + [units[:0]] * (-len(micro_batches) % world_size)


def cut(units: np.ndarray, sizes: UnitSizes, budget: float) -> list[np.ndarray]:
    """``units`` in their order, in micro-batches of at most ``budget`` tokens; a larger unit is alone."""
    micro_batches, start = [], 0
    while start < len(units):
        taken = window = 64
        while taken == window:
            window *= 4
            taken = int(np.searchsorted(sizes.costs(units[start : start + window]), budget, side="right"))
        micro_batches.append(units[start : start + max(taken, 1)])
        start += max(taken, 1)
    return micro_batches


def _smallest_limit(units: np.ndarray, sizes: UnitSizes, budget: int, count: int) -> int:
    """Fewest tokens a micro-batch with which ``units`` still fit into ``count`` of them."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(cut(units, sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return high


def _padding(micro_batches: list[np.ndarray], sizes: UnitSizes) -> float:
    padded = sum(sizes.costs(units)[-1] for units in micro_batches)
    return 1 - sum(sizes.lengths[units].sum() for units in micro_batches) / padded
