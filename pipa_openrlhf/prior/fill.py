"""Fill the prior cache: one forward pass over the responses that have no entry yet, shared out over the ranks."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.plan import UnitSizes, cut
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.data.training_set import unit_sizes
from pipa_openrlhf.distributed.strategy import Strategy, device
from pipa_openrlhf.distributed.transfer import on_device
from pipa_openrlhf.errors import Stopped, UserError
from pipa_openrlhf.lag import wait_until
from pipa_openrlhf.model.policy import Policy, PolicyActor, load_lm
from pipa_openrlhf.model.self_check import check_cached, choose_layout
from pipa_openrlhf.prior.cache import PriorCache, prior_id

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import Callback

log = logging.getLogger(__name__)

# A shard is written at least this often, so that an interrupted pass goes on where it stopped.
SECONDS_PER_SHARD = 60
# Samples whose tokens are looked at together for the prefixes that they share.
_STRETCH = 4096
# Of the memory that is free before the pass, what its activations may take: the output head has a share of its own.
_SHARE_OF_FREE = 0.25
# Larger forward passes are no faster.
_MOST_TOKENS = 2**15


def open_cache(config: RunConfig, strategy: Strategy) -> PriorCache:
    """The cache of this run's prior."""
    identity = [prior_id(prior_path(config), config.prior.cache_dir) if strategy.is_rank_0() else ""]
    torch.distributed.broadcast_object_list(identity)
    precision = config.ds.param_dtype + ("-4bit" if config.ds.load_in_4bit else "")
    return PriorCache(config.prior.cache_dir, identity[0], precision)


def prior_path(config: RunConfig) -> str:
    """Name or folder of the prior: the policy's own start unless another is given."""
    return config.prior_path or config.model.path


def fill_from_separate_model(
    config: RunConfig,
    cache: PriorCache,
    samples: Samples,
    strategy: Strategy,
    pad_token_id: int,
    callbacks: "Sequence[Callback]" = (),
) -> None:
    """Load the prior, compute what is missing, and free it; nothing is loaded where nothing is missing."""
    absent = count_missing(cache, samples, strategy)
    _report(strategy, samples, absent, cache)
    if not absent.any():
        return
    log.info(f"Loading the prior {prior_path(config)}")
    actor = strategy.prepare(PolicyActor(Policy(load_lm(config, prior_path(config), strategy.get_ds_eval_config()))))
    choose_layout(config, actor, samples, strategy, pad_token_id)
    _fill(config, cache, samples, absent, actor, strategy, pad_token_id, callbacks)
    strategy.free(actor)


def fill_from_policy(
    config: RunConfig,
    cache: PriorCache,
    samples: Samples,
    actor: PolicyActor,
    strategy: Strategy,
    pad_token_id: int,
    callbacks: "Sequence[Callback]" = (),
) -> None:
    """Compute what is missing with the training engine, before its first update.

    Until then the policy is the SFT model (LoRA's B is zero), so it is its own prior.
    """
    absent = count_missing(cache, samples, strategy)
    _report(strategy, samples, absent, cache)
    _fill(config, cache, samples, absent, actor, strategy, pad_token_id, callbacks)


def _fill(config, cache, samples, absent, actor, strategy, pad_token_id, callbacks) -> None:
    actor.model.eval()
    check_cached(actor, cache, samples, absent, strategy)
    if not absent.any():
        return
    missing = samples[np.flatnonzero(absent)]
    sizes = unit_sizes(missing, actor.layout)
    training = sizes.budget(config.train.micro_batch_size, config.train.max_tokens_per_micro_batch)
    # Eager attention holds the square of a sequence, which no number of bytes a token accounts for.
    free = None if actor.attention == "eager" else strategy.least_free_memory()
    fill_cache(
        cache,
        missing,
        lambda batch: actor(batch, with_value=False).log_f,
        strategy,
        pad_token_id,
        _plan(sizes, pass_budget(training, free, actor.policy.bytes_a_token)),
        actor.layout,
        callbacks,
    )


def pass_budget(training: int, free: int | None, bytes_a_token: int) -> int:
    """Tokens of a forward pass without gradients: as many as the free memory holds, never fewer than in training.

    Args:
        training: tokens of a micro-batch of training, which fits with its gradients.
        free: bytes that can still be allocated; None on a CPU, where larger passes are no faster.
        bytes_a_token: of activations.
    """
    if free is None:
        return training
    return max(training, min(int(free * _SHARE_OF_FREE) // bytes_a_token, _MOST_TOKENS))


def _report(strategy: Strategy, samples: Samples, absent: np.ndarray, cache: PriorCache) -> None:
    misses = int(absent.sum())
    log.info(f"Prior cache: {len(samples) - misses} hits, {misses} misses in {cache.folder}")


def count_missing(cache: PriorCache, samples: Samples, strategy: Strategy) -> np.ndarray:
    """[len(samples)] bool, True at samples that some rank cannot find; the same on every rank."""
    absent = torch.from_numpy(cache.missing(samples).astype(np.int32)).to(device())
    return strategy.all_reduce(absent, op="max").cpu().numpy().astype(bool)


@torch.no_grad()
def fill_cache(
    cache: PriorCache,
    samples: Samples,
    log_probs_of: Callable[[Batch], torch.Tensor],
    strategy: Strategy,
    pad_token_id: int,
    batches: list[np.ndarray],
    layout: str,
    callbacks: "Sequence[Callback]" = (),
) -> None:
    """Compute and store the prior's log-probs of ``samples``; what was computed is kept however it ends.

    Args:
        samples: those without an entry, the same on every rank.
        log_probs_of: a micro-batch -> [B, T] float32, a collective call under ZeRO-3.
        batches: indices of the samples of each forward pass, the same on every rank.
        layout: see :func:`collate`.

    Raises:
        Stopped: a callback of some rank wanted to.
        UserError: a rank cannot see what another one wrote.
    """
    rank, world_size = strategy.get_rank(), strategy.world_size
    finished: list[tuple[Sample, np.ndarray]] = []
    last_write = time.monotonic()
    bar = tqdm(total=len(samples), desc="Prior log-probs", unit="answer", disable=rank != 0)
    _tell(callbacks, "on_prior_begin")
    # Every rank runs the same number of forward passes; one without work repeats the last batch and stores nothing.
    firsts = range(0, len(batches), world_size)
    mine = [first + rank if first + rank < len(batches) else -1 for first in firsts]
    collated = (
        collate(list(samples[batches[index]]), None, pad_token_id, layout, every_response_token=True) for index in mine
    )
    try:
        for first, index, batch in zip(firsts, mine, on_device(collated)):
            rows = log_probs_of(batch).cpu().numpy()
            if index >= 0:
                finished += [(sample, row[: len(sample.labels)]) for sample, row in zip(samples[batches[index]], rows)]
            if finished and time.monotonic() - last_write > SECONDS_PER_SHARD:
                cache.add(*zip(*finished))
                finished, last_write = [], time.monotonic()
            bar.update(sum(len(some) for some in batches[first : first + world_size]))
            # Neighbouring batches are of like work, so that nobody waits long for the others' answer.
            if _some_rank_stops(callbacks, strategy):
                log.info(
                    f"Stopped after the prior scored {bar.n} of {bar.total} answers; go on with --ckpt.load_enable"
                )
                raise Stopped
    finally:
        bar.close()
        if finished:
            cache.add(*zip(*finished))
        _tell(callbacks, "on_prior_end")
    strategy.barrier()
    wait_until(lambda: not _missing_now(cache, samples).any())
    if count_missing(cache, samples, strategy).any():
        raise UserError(f"--prior.cache_dir must be one folder that every node sees; ranks differ in {cache.folder}")


def _missing_now(cache: PriorCache, samples: Samples) -> np.ndarray:
    """What no shard has that this rank's file server shows by now."""
    cache.refresh()
    return cache.missing(samples)


def _tell(callbacks: "Sequence[Callback]", hook: str) -> None:
    for callback in callbacks:
        getattr(callback, hook)()


def _some_rank_stops(callbacks: "Sequence[Callback]", strategy: Strategy) -> bool:
    asked = torch.tensor(float(any(callback.wants_stop() for callback in callbacks)), device=device())
    return bool(strategy.all_reduce(asked, op="max"))


def _plan(sizes: UnitSizes, budget: int) -> list[np.ndarray]:
    """Indices of the samples of each forward pass of at most ``budget`` tokens."""
    lines = map(sizes.line_up, sizes.stretches(np.arange(len(sizes.lengths)), _STRETCH))
    return [line.units[part] for line in lines for part in cut(line, budget)]
