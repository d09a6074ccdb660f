"""Which samples each rank runs in each micro-batch of each optimizer step."""

import math

import numpy as np

from pipa_openrlhf.distributed.upstream import DistributedSampler


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch in OpenRLHF's shuffled order; the last one may be smaller.

    The order is that of its DistributedSampler, which does not depend on the number of ranks.
    """
    sampler = DistributedSampler(range(num_samples), num_replicas=1, rank=0, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    order = np.fromiter(sampler, dtype=np.int64, count=num_samples)
    return [order[start : start + batch_size] for start in range(0, num_samples, batch_size)]


def rank_micro_batches(batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because ZeRO's collectives run in step; a rank without work has
    empty ones.
    """
    share = batch[rank::world_size]
    count = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    return [share[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]
