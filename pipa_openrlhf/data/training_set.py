"""Samples as the trainer takes them: in units of one answer or one pair, with KTO's mismatched completions."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from pipa_openrlhf.data.batch import prompt_keys
from pipa_openrlhf.data.next_match import NEVER, next_matches
from pipa_openrlhf.data.plan import UnitSizes
from pipa_openrlhf.data.tokenise import Sample


@dataclass(frozen=True)
class TrainingSet:
    """Samples in data order.

    Attributes:
        samples: where a unit is a pair, chosen and rejected alternate.
        unit_size: 1: the unit of a batch is an answer; 2: a pair.
        mismatched: per sample, its prompt with another problem's answer, or None; empty where not needed.
    """

    samples: list[Sample]
    unit_size: int = 1
    mismatched: tuple[Sample | None, ...] = ()

    @property
    def num_units(self) -> int:
        """Answers or pairs."""
        return len(self.samples) // self.unit_size

    def rows(self, units: np.ndarray) -> np.ndarray:
        """Indices into ``samples`` of the answers of ``units``, in order."""
        return (np.asarray(units)[:, None] * self.unit_size + np.arange(self.unit_size)).ravel().astype(np.int64)

    def sizes(self, layout: str) -> UnitSizes:
        """What its units cost in one forward pass in ``layout``."""
        return unit_sizes(self.samples, layout, self.unit_size)

    def fingerprint(self) -> str:
        """Hex digest of token ids, labels, order, and what else a loss may take from the samples."""
        digest = hashlib.sha256(np.int64([self.unit_size, len(self.samples)]).tobytes())
        for sample in (*self.samples, *self.mismatched):
            if sample is None:
                digest.update(b"none")
                continue
            digest.update(np.int64([sample.prompt_len, len(sample.input_ids), sample.answer_label]).tobytes())
            for array in (sample.input_ids, sample.labels, sample.mask, sample.step_ids):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def scored_by_prior(self) -> list[Sample]:
        """Everything the prior must score."""
        return self.samples + [sample for sample in self.mismatched if sample is not None]


def unit_sizes(samples: list[Sample], layout: str, unit_size: int = 1) -> UnitSizes:
    """What units of ``unit_size`` neighbouring samples cost in one forward pass in ``layout``."""
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    firsts = samples[::unit_size]
    return UnitSizes(
        lengths=lengths.reshape(-1, unit_size).max(axis=1),
        prompts=prompt_numbers(firsts),
        prompt_lengths=np.array([sample.prompt_len for sample in firsts], dtype=np.int64),
        layout=layout,
    )


def prompt_numbers(samples: list[Sample]) -> np.ndarray:
    """[len(samples)] the same number where prompts are the same tokens."""
    numbers: dict[bytes | int, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in prompt_keys(samples)], dtype=np.int64)


def mismatched_completions(samples: list[Sample], max_len: int) -> tuple[Sample | None, ...]:
    """For every sample its prompt with the answer of the next sample, cyclically, that is of another problem and fits.

    Fixed once per data set, so that the prior's log-probs of mismatches are cached like all others. None where no
    answer qualifies.
    """
    numbers: dict[str, int] = {}
    problems = np.array([numbers.setdefault(one.problem_id, len(numbers)) for one in samples], dtype=np.int64)
    prompt_lens = np.array([one.prompt_len for one in samples], dtype=np.int64)
    partners = np.full(len(samples), -1)
    for has_prompt in (True, False):
        # Without a prompt nothing predicts an answer's first token, so another one must be inside the mask.
        usable = [one.mask[0 if has_prompt else 1 :].any() for one in samples]
        sizes = np.array([len(one.labels) if fits else NEVER for one, fits in zip(samples, usable)], dtype=np.int64)
        queries = np.flatnonzero((prompt_lens > 0) == has_prompt)
        if len(queries):
            partners[queries] = next_matches(problems, sizes, queries, max_len - prompt_lens[queries])
    return tuple(
        None if partner < 0 else _mismatch(own, samples[partner]) for own, partner in zip(samples, partners.tolist())
    )


def _mismatch(own: Sample, other: Sample) -> Sample:
    """The prompt of ``own`` with the answer of ``other``."""
    mask = other.mask.copy()
    if own.prompt_len == 0:
        mask[0] = 0  # nothing predicts the first token
    return replace(
        own,
        input_ids=np.concatenate([own.input_ids[: own.prompt_len], other.input_ids[other.prompt_len :]]),
        labels=other.labels,
        mask=mask,
        step_ids=other.step_ids,
        answer_label=other.answer_label,
        pair_id=None,
    )
