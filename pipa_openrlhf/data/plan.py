"""Which units (answers or pairs) each rank runs in each micro-batch of each optimizer step."""

import math

import numpy as np

from pipa_openrlhf.distributed.upstream import DistributedSampler

# Units are sorted by length within this many batches: enough for little padding, few enough to keep batches varied.
BATCHES_SORTED_TOGETHER = 200


def global_batches(
    num_units: int, batch_size: int, seed: int, epoch: int, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """The global batches of an epoch; the last one may be smaller. They do not depend on the number of ranks.

    Args:
        lengths: [num_units] tokens; given, batches hold units of similar length, in random order of batches.
            Otherwise the order is that of OpenRLHF's DistributedSampler.
    """
    sampler = DistributedSampler(range(num_units), num_replicas=1, rank=0, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    order = np.fromiter(sampler, dtype=np.int64, count=num_units)
    if lengths is not None:
        size = batch_size * BATCHES_SORTED_TOGETHER
        groups = (order[start : start + size] for start in range(0, num_units, size))
        order = np.concatenate([group[np.argsort(-lengths[group], kind="stable")] for group in groups])
    batches = [order[start : start + batch_size] for start in range(0, num_units, batch_size)]
    if lengths is not None:
        full = len(batches) if len(batches[-1]) == batch_size else len(batches) - 1
        shuffled = np.random.default_rng([seed, epoch]).permutation(full)
        batches = [batches[index] for index in shuffled] + batches[full:]
    return batches


def rank_micro_batches(
    batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because ZeRO's collectives run in step; a rank without work has
    empty ones.

    Args:
        lengths: of all units; given, units of similar length share a micro-batch, and ranks get micro-batches of
            similar length at the same time.
    """
    count = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    if lengths is not None:
        by_length = batch[np.argsort(-lengths[batch], kind="stable")]
        return np.array_split(by_length, count * world_size)[rank::world_size]
    share = batch[rank::world_size]
    return [share[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]


def token_budget_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, longest first, each at most ``budget`` tokens when padded."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
