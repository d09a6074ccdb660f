"""Fill the prior cache: one forward pass over the responses that have no entry yet, shared out over the ranks."""

import time
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.prior_cache import PriorCache
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError

# A shard is written at least this often, so that an interrupted pass goes on where it stopped.
SECONDS_PER_SHARD = 60


def count_missing(cache: PriorCache, samples: list[Sample], strategy: Strategy) -> np.ndarray:
    """[len(samples)] bool, True at samples that some rank cannot find; the same on every rank."""
    absent = torch.from_numpy(cache.missing(samples).astype(np.int32)).to(device())
    return strategy.all_reduce(absent, op="max").cpu().numpy().astype(bool)


@torch.no_grad()
def fill_cache(
    cache: PriorCache,
    samples: list[Sample],
    log_probs_of: Callable[[Batch], torch.Tensor],
    strategy: Strategy,
    pad_token_id: int,
    packed: bool,
    micro_batch_size: int,
) -> None:
    """Compute and store the prior's log-probs of ``samples``.

    Args:
        samples: those without an entry, the same list on every rank.
        log_probs_of: a micro-batch -> [B, T] float32, a collective call under ZeRO-3.
        packed: pack micro-batches into one row.
        micro_batch_size: sequences a forward pass.

    Raises:
        UserError: a rank cannot see what another one wrote.
    """
    by_length = sorted(samples, key=lambda sample: -len(sample.input_ids))
    batches = [by_length[start : start + micro_batch_size] for start in range(0, len(by_length), micro_batch_size)]
    rank, world_size = strategy.get_rank(), strategy.world_size
    finished: list[tuple[Sample, np.ndarray]] = []
    last_write = time.monotonic()
    bar = tqdm(total=len(samples), desc="Prior log-probs", unit="answer", disable=rank != 0)
    # Every rank runs the same number of forward passes; one without work repeats the last batch and stores nothing.
    for first in range(0, len(batches), world_size):
        mine = first + rank < len(batches)
        batch_samples = batches[first + rank] if mine else batches[-1]
        batch = collate(batch_samples, None, pad_token_id, packed, every_response_token=True)
        rows = log_probs_of(batch.to(device())).cpu().numpy()
        if mine:
            finished += [(sample, row[: len(sample.labels)]) for sample, row in zip(batch_samples, rows)]
        if finished and time.monotonic() - last_write > SECONDS_PER_SHARD:
            cache.add(*zip(*finished))
            finished, last_write = [], time.monotonic()
        bar.update(sum(len(some) for some in batches[first : first + world_size]))
    if finished:
        cache.add(*zip(*finished))
    bar.close()
    strategy.barrier()
    cache.refresh()
    if count_missing(cache, samples, strategy).any():
        raise UserError(f"--prior.cache_dir must be one folder that every node sees; ranks differ in {cache.folder}")
