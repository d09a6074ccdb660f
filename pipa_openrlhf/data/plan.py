"""Which units (answers or pairs) each rank runs in each micro-batch of each optimizer step."""

import math
from dataclasses import dataclass

import numpy as np

from pipa_openrlhf.distributed.upstream import DistributedSampler

# Units are sorted by length within this many batches: enough for little padding, few enough to keep batches varied.
BATCHES_SORTED_TOGETHER = 200


@dataclass(frozen=True)
class Grouping:
    """What brings units together in a batch: similar length, and the same prompt where that is to be shared.

    Attributes:
        lengths: [num_units] tokens.
        prompts: [num_units] number of each unit's prompt; None: prompts do not matter.
    """

    lengths: np.ndarray
    prompts: np.ndarray | None = None

    def sort(self, units: np.ndarray) -> np.ndarray:
        """Longest first, in their order where lengths are equal; units of one prompt side by side, placed by their
        mean length."""
        lengths = self.lengths[units]
        if self.prompts is None:
            return units[np.argsort(-lengths, kind="stable")]
        _, first_place, prompts = np.unique(self.prompts[units], return_index=True, return_inverse=True)
        mean_lengths = np.bincount(prompts, lengths) / np.bincount(prompts)
        return units[np.lexsort((-lengths, first_place[prompts], -mean_lengths[prompts]))]

    def gather(self, order: np.ndarray) -> np.ndarray:
        """``order`` with the units of a prompt moved to the first of them."""
        if self.prompts is None:
            return order
        _, first_place, prompts = np.unique(self.prompts[order], return_index=True, return_inverse=True)
        return order[np.argsort(first_place[prompts], kind="stable")]


def global_batches(
    num_units: int, batch_size: int, seed: int, epoch: int, grouping: Grouping | None = None
) -> list[np.ndarray]:
    """The global batches of an epoch; the last one may be smaller. They do not depend on the number of ranks.

    Args:
        grouping: given, batches hold units that belong together, in random order of batches. Otherwise the order is
            that of OpenRLHF's DistributedSampler.
    """
    sampler = DistributedSampler(range(num_units), num_replicas=1, rank=0, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    order = np.fromiter(sampler, dtype=np.int64, count=num_units)
    if grouping is not None:
        order = grouping.gather(order)
        size = batch_size * BATCHES_SORTED_TOGETHER
        order = np.concatenate([grouping.sort(order[start : start + size]) for start in range(0, num_units, size)])
    batches = [order[start : start + batch_size] for start in range(0, num_units, batch_size)]
    if grouping is not None:
        full = len(batches) if len(batches[-1]) == batch_size else len(batches) - 1
        shuffled = np.random.default_rng([seed, epoch]).permutation(full)
        batches = [batches[index] for index in shuffled] + batches[full:]
    return batches


def rank_micro_batches(
    batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int, grouping: Grouping | None = None
) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because ZeRO's collectives run in step; a rank without work has
    empty ones.

    Args:
        grouping: given, units that belong together share a micro-batch, and ranks get micro-batches of similar length
            at the same time.
    """
    count = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    if grouping is not None:
        return np.array_split(grouping.sort(batch), count * world_size)[rank::world_size]
    share = batch[rank::world_size]
    return [share[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]


def token_budget_batches(grouping: Grouping, prompt_lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices of sequences in batches of at most ``budget`` tokens, longest first; a longer sequence is alone.

    Without prompts in ``grouping`` all sequences of a batch count as long as its longest. With them a batch holds each
    prompt once and nothing is padded; only attention sees whole sequences, at most twice the budget when padded.

    Args:
        grouping: of all sequences.
        prompt_lengths: [number of sequences] tokens that sequences of one prompt share.
    """
    shares = grouping.prompts is not None
    batches: list[list[int]] = []
    tokens = longest = 0
    for index in grouping.sort(np.arange(len(grouping.lengths))):
        length = added = grouping.lengths[index]
        if shares and batches and grouping.prompts[index] == grouping.prompts[batches[-1][-1]]:
            added = length - prompt_lengths[index]
        longest = max(longest, length)
        padded = (len(batches[-1]) + 1) * longest if batches else math.inf
        fits = tokens + added <= budget and padded <= 2 * budget if shares else padded <= budget
        if not fits:
            batches.append([])
            tokens, longest, added = 0, length, length
        batches[-1].append(index)
        tokens += added
    return [np.array(batch) for batch in batches]
