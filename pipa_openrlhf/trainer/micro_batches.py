"""This rank's micro-batches of a data set, as tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.plan import rank_micro_batches
from pipa_openrlhf.data.prior_cache import PriorCache
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.data.training_set import TrainingSet


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs in one forward pass; an idle rank runs a stand-in that must not count."""

    batch: Batch
    is_idle: bool


@dataclass(frozen=True)
class StepBatches:
    """A rank's part of one optimizer step: the answers, and KTO's mismatched completions of the same answers."""

    answers: list[MicroBatch]
    mismatched: list[MicroBatch]


@dataclass(frozen=True)
class Collator:
    """How samples become a batch.

    Attributes:
        cache: log-probs of the prior for every sample; None where the objective has no prior.
        layout: see :func:`collate`.
        keep_last_token: see :func:`collate`.
    """

    cache: PriorCache | None
    pad_token_id: int
    layout: str
    keep_last_token: bool

    def __call__(self, samples: list[Sample]) -> Batch:
        log_p = None if self.cache is None else [self.cache.log_probs(sample) for sample in samples]
        return collate(samples, log_p, self.pad_token_id, self.layout, keep_last_token=self.keep_last_token)


class MicroBatches:
    """Cuts sets of units of a data set into micro-batches of this rank.

    Args:
        micro_batch_size: see :func:`rank_micro_batches`.
        by_size: units of similar length share a micro-batch; otherwise they keep their order.
    """

    def __init__(
        self, data: TrainingSet, collator: Collator, rank: int, world_size: int, micro_batch_size: int, by_size: bool
    ):
        self.data = data
        self.collator = collator
        self._place = (rank, world_size, micro_batch_size)
        self._sizes = data.sizes(collator.layout) if by_size else None
        # Mismatched completions are a data set of their own: other lengths, and not every answer has one.
        self._mismatched = TrainingSet([sample for sample in data.mismatched if sample is not None])
        has_one = np.array([sample is not None for sample in data.mismatched], dtype=bool)
        self._mismatch_of = np.where(has_one, np.cumsum(has_one) - 1, -1)
        several = by_size and self._mismatched.samples
        self._mismatched_sizes = self._mismatched.sizes(collator.layout) if several else None

    @property
    def prompts(self) -> np.ndarray | None:
        """[num_units] number of each unit's prompt; None where units keep their order."""
        return None if self._sizes is None else self._sizes.prompts

    def step(self, units: np.ndarray) -> StepBatches:
        """Everything this rank runs for a global batch of ``units``."""
        return StepBatches(list(self.answers(units)), list(self.mismatched(units)))

    def num_answers(self, units: np.ndarray) -> int:
        """How many micro-batches :meth:`answers` yields."""
        return len(rank_micro_batches(units, *self._place, self._sizes))

    def answers(self, units: np.ndarray) -> Iterator[MicroBatch]:
        """One at a time; the same number on every rank."""
        return self._collate(self.data, rank_micro_batches(units, *self._place, self._sizes))

    def mismatched(self, units: np.ndarray) -> Iterator[MicroBatch]:
        """Mismatched completions of the answers of ``units``; none where no answer has one."""
        if not self._mismatched.samples:
            return iter(())
        found = self._mismatch_of[self.data.rows(units)]
        plan = rank_micro_batches(found[found >= 0], *self._place, self._mismatched_sizes)
        return self._collate(self._mismatched, plan)

    def _collate(self, data: TrainingSet, plan: list[np.ndarray]) -> Iterator[MicroBatch]:
        for units in plan:
            # An idle rank still runs a forward pass, on the first unit: ZeRO's collectives need every rank.
            rows = data.rows(units if len(units) else np.array([0]))
            yield MicroBatch(self.collator([data.samples[row] for row in rows]), is_idle=not len(units))


class _Steps(Dataset):
    """One item an optimizer step."""

    def __init__(self, batches: list[np.ndarray], micro_batches: MicroBatches):
        self.batches = batches
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> StepBatches:
        return self.micro_batches.step(self.batches[step])


def load_steps(batches: list[np.ndarray], micro_batches: MicroBatches, num_workers: int) -> DataLoader:
    """:meth:`MicroBatches.step` of each global batch, prepared by worker processes where there are any."""
    return DataLoader(
        _Steps(batches, micro_batches),
        batch_size=None,
        num_workers=num_workers,
        # With a generator of its own the loader leaves the one that dropout draws from alone, as resuming needs.
        generator=torch.Generator(),
        worker_init_fn=_share_by_name,
    )


def _share_by_name(_worker: int) -> None:
    """Tensors go to the trainer as named shared memory: by default each takes one of its file descriptors."""
    torch.multiprocessing.set_sharing_strategy("file_system")
