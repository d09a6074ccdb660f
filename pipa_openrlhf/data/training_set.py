"""Samples as the trainer takes them: in units of one answer or one pair, with KTO's mismatched completions."""

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.plan import UnitSizes, rank_micro_batches
from pipa_openrlhf.data.samples import Joined, Sample, Samples
from pipa_openrlhf.objectives.kto import MismatchedCompletions
from pipa_openrlhf.prior.cache import PriorCache


@dataclass(frozen=True)
class TrainingSet:
    """Samples in data order.

    Attributes:
        samples: where a unit is a pair, chosen and rejected alternate.
        unit_size: 1: the unit of a batch is an answer; 2: a pair.
        mismatched: prompts with other problems' answers; None where not needed.
    """

    samples: Samples
    unit_size: int = 1
    mismatched: MismatchedCompletions | None = None

    @property
    def num_units(self) -> int:
        """Answers or pairs."""
        return len(self.samples) // self.unit_size

    def rows(self, units: np.ndarray) -> np.ndarray:
        """Indices into ``samples`` of the answers of ``units``, in order."""
        return (np.asarray(units)[:, None] * self.unit_size + np.arange(self.unit_size)).ravel().astype(np.int64)

    def sizes(self, layout: str, attention: float = 0.0) -> UnitSizes:
        """What its units cost in one forward pass in ``layout``; ``attention`` as in :class:`UnitSizes`."""
        return unit_sizes(self.samples, layout, self.unit_size, attention)

    def fingerprint(self) -> str:
        """Hex digest of token ids, labels, order, and what else a loss may take from the samples."""
        digest = hashlib.sha256(np.array([self.unit_size, len(self.samples)], dtype=np.int64).tobytes())
        digest.update(self.samples.column("digest").tobytes())
        if self.mismatched is not None:
            digest.update(self.mismatched.partners.astype(np.int64).tobytes())
        return digest.hexdigest()

    def scored_by_prior(self) -> Samples:
        """Everything the prior must score."""
        return self.samples if self.mismatched is None else Joined([self.samples, self.mismatched])


def unit_sizes(samples: Samples, layout: str, unit_size: int = 1, attention: float = 0.0) -> UnitSizes:
    """What units of ``unit_size`` neighbouring samples cost in one forward pass in ``layout``."""
    return UnitSizes(
        lengths=samples.column("length").astype(np.int64).reshape(-1, unit_size).max(axis=1),
        prompts=prompt_numbers(samples.column("prompt_key")[::unit_size], samples.column("prompt_len")[::unit_size]),
        layout=layout,
        sequences_of=partial(_inputs_of_units, samples, unit_size),
        unit_size=unit_size,
        attention=attention,
    )


def _inputs_of_units(samples: Samples, unit_size: int, units: np.ndarray) -> list[np.ndarray]:
    """What the model is given of the samples of ``units``: all their tokens but the last."""
    rows = (units[:, None] * unit_size + np.arange(unit_size)).ravel().tolist()
    return [samples.tokens(row)[:-1] for row in rows]


def prompt_numbers(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same number where prompts have the same key; a number of its own where there is no prompt."""
    _, numbers = np.unique(keys, return_inverse=True)
    return np.where(lengths > 0, numbers, len(keys) + np.arange(len(keys)))


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
        micro_batch_size, max_tokens: see :func:`rank_micro_batches`.
        by_size: units of similar length share a micro-batch; otherwise they keep their order.
        attention: see :class:`UnitSizes`.
    """

    def __init__(
        self,
        data: TrainingSet,
        collator: Collator,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        by_size: bool,
        max_tokens: int | None = None,
        attention: float = 0.0,
    ):
        self.data = data
        self.collator = collator
        self._place = (rank, world_size, micro_batch_size)
        self._max_tokens, self._by_size = max_tokens, by_size
        needs_sizes = by_size or max_tokens is not None
        self._sizes = data.sizes(collator.layout, attention) if needs_sizes else None
        self._mismatched_sizes: UnitSizes | None = None
        # Mismatched completions are a data set of their own: other lengths, and not every answer has one.
        self._mismatched = TrainingSet(data.mismatched) if data.mismatched else None
        if needs_sizes and self._mismatched is not None:
            self._mismatched_sizes = self._mismatched.sizes(collator.layout, attention)

    @property
    def prompts(self) -> np.ndarray | None:
        """[num_units] number of each unit's prompt; None where units keep their order."""
        return self._sizes.prompts if self._sizes is not None and self._by_size else None

    def step(self, units: np.ndarray) -> StepBatches:
        """Everything this rank runs for a global batch of ``units``."""
        return StepBatches(list(self.answers(units)), list(self.mismatched(units)))

    def num_answers(self, units: np.ndarray) -> int:
        """How many micro-batches :meth:`answers` yields."""
        return len(self.plan(units))

    def plan(self, units: np.ndarray) -> list[np.ndarray]:
        """The units of each of :meth:`answers`, none where the rank is idle."""
        return self._plan(units, self._sizes)

    def answers(self, units: np.ndarray) -> Iterator[MicroBatch]:
        """One at a time; the same number on every rank."""
        return self._collate(self.data, self.plan(units))

    def mismatched(self, units: np.ndarray) -> Iterator[MicroBatch]:
        """Mismatched completions of the answers of ``units``; none where no answer has one."""
        if self._mismatched is None or self.data.mismatched is None:
            return iter(())
        found = self.data.mismatched.of_rows(self.data.rows(units))
        return self._collate(self._mismatched, self._plan(found, self._mismatched_sizes))

    def _plan(self, units: np.ndarray, sizes: UnitSizes | None) -> list[np.ndarray]:
        return rank_micro_batches(units, *self._place, sizes, self._max_tokens, self._by_size)

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
        worker_init_fn=_begin_worker,
    )


def _begin_worker(_worker: int) -> None:
    """Tensors go to the trainer as named shared memory: by default each takes one of its file descriptors.

    Signals that ask a run to stop reach every process of it; the trainer needs its workers until its step is done.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
