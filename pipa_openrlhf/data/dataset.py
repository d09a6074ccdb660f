"""From the data flags to samples: the one call that trainers and tools make."""

import logging
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import SeedConfig
from pipa_openrlhf.data.config import DataConfig, parse_probabilities
from pipa_openrlhf.data.input_template import fill_template
from pipa_openrlhf.data.layouts import check_prompts
from pipa_openrlhf.data.prepare import Request, prepare
from pipa_openrlhf.data.record import BadRow
from pipa_openrlhf.data.render import use_chat_template
from pipa_openrlhf.data.samples import Samples
from pipa_openrlhf.data.sources import open_sources
from pipa_openrlhf.errors import UserError

log = logging.getLogger(__name__)

TIES = "rows without an answer to learn from (a tie, an empty tree)"


class DataRun(Protocol):
    """What reading data takes of a command's settings."""

    @property
    def data(self) -> DataConfig:
        """What is read."""

    @property
    def train(self) -> SeedConfig:
        """Its seed decides the order."""

    @property
    def use_ms(self) -> bool:
        """Download from ModelScope."""


@dataclass(frozen=True)
class LoadedData:
    """Samples in data order; the two sides of a pair are neighbours, chosen first.

    Attributes:
        dropped: how many records were left out, by reason.
        format: the formats the data sets were read as.
        num_records: answers read, before anything was left out.
        label_sources: how many of them were labelled by what, see ``data/record.py``.
        bad_rows: the rows that were skipped.
    """

    samples: Samples
    dropped: dict[str, int]
    format: str
    num_records: int
    label_sources: Counter[str]
    bad_rows: list[BadRow]


def load_samples(
    config: DataRun,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str | None,
    probs: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    pairs_only: bool = False,
    keep: str = "all",
) -> LoadedData:
    """Read, check, tokenise, pair and filter a data set as the flags say.

    Args:
        config: ``data``, ``train.seed`` and ``use_ms`` are used.
        max_samples: unset: ``--data.max_samples``.
        pairs_only: the objective compares pairs.
        keep: ``positive``, ``negative`` or ``all`` answers.

    Raises:
        UserError: the data or a data flag cannot be used, or nothing is left of the data.
    """
    flags = _usable_templates(config.data, tokenizer)
    limit = flags.max_samples if max_samples is None else max_samples
    seed, name = config.train.seed, str(dataset)
    sources = open_sources(dataset, split, limit, config.use_ms, flags.streaming)
    if probs is not None:
        parse_probabilities(probs, len(sources))
    prepared = prepare(Request(name, sources, probs, seed, limit, flags, tokenizer))
    samples: Samples = prepared.samples
    dropped = prepared.dropped
    check_prompts(prepared.counts.without_prompt, prepared.counts.records, name, flags)
    pairing = "given" if pairs_only and flags.pairing == "auto" else flags.pairing
    if pairing == "given" and (samples.column("pair_id") < 0).any():
        raise UserError(
            f"{name} holds single answers and pairs are wanted: give --data.pairing match to match "
            "each right answer with a wrong one of the same problem"
        )
    log.info(
        f"{name}: {len(samples)} of {prepared.counts.records} answers kept, "
        + (f"dropped {dropped}" if dropped.counts else "none dropped")
    )
    counts = dict(dropped.counts)
    if ties := prepared.counts.ties:
        counts[TIES] = ties
        log.info(f"{name}: {ties} {TIES}")
    if not samples:
        raise UserError(f"{name}: nothing left to train on, dropped {dropped}")
    if pairing != "auto":
        samples = _pair(samples, seed, pairing, name, counts)
    samples = _keep(samples, keep, name, counts)
    formats = ", ".join(dict.fromkeys(prepared.formats))
    return LoadedData(samples, counts, formats, prepared.counts.records, prepared.label_sources, prepared.bad)


def _usable_templates(flags: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataConfig:
    """The data flags, with the input template dropped where OpenRLHF drops it."""
    template = flags.input_template
    if flags.apply_chat_template:
        use_chat_template(tokenizer, flags.tokenizer_chat_template)
    if template is not None and flags.apply_chat_template:
        log.info("--data.input_template is not used with --data.apply_chat_template")
        template = None
    if template is not None and "{}" not in template:
        log.info("--data.input_template has no {}: it is not used")
        template = None
    if template is not None and "\\n" in template:
        log.info("--data.input_template holds a backslash and an n, not a newline; in bash a newline is $'\\n'")
    fill_template("", template)  # a mistake in it shows before any row is read
    return replace(flags, input_template=template)


def _pair(samples: Samples, seed: int, pairing: str, dataset: str, dropped: dict[str, int]) -> Samples:
    paired = match_pairs(samples, seed)
    unmatched = len(samples) - len(paired)
    given = int((samples.column("pair_id") >= 0).sum()) // 2
    right = int(samples.column("answer_label").sum(dtype=np.int64)) - len(paired) // 2
    log.info(
        f"{dataset}: {len(paired) // 2} pairs{' (as given)' if given else ''}, "
        f"dropped without a partner: {right} right and {unmatched - right} wrong answers"
    )
    if unmatched:
        dropped[f"without a partner (--data.pairing {pairing})"] = unmatched
    if not paired:
        raise UserError(f"{dataset}: --data.pairing {pairing} found no problem with a right and a wrong answer")
    return paired


def _keep(samples: Samples, keep: str, dataset: str, dropped: dict[str, int]) -> Samples:
    if keep == "all":
        return samples
    kept = keep_labels(samples, keep)
    log.info(f"{dataset}: {len(kept)} {keep} answers kept of {len(samples)} (--data.keep {keep})")
    if len(kept) < len(samples):
        dropped[f"not {keep} (--data.keep)"] = len(samples) - len(kept)
    if not kept:
        raise UserError(f"{dataset}: --data.keep {keep}, but no answer is {keep}")
    return kept


KEEP = {"positive": (1,), "negative": (0,), "all": (0, 1)}


def match_pairs(samples: Samples, seed: int) -> Samples:
    """Chosen, rejected, chosen, rejected, ...: only what has a partner, in the order of each pair's first member.

    Pairs that the data gave stay as they are. Single answers are matched at random within their problem; the result
    depends on ``seed`` and on the order of the samples, on nothing else.
    """
    pair_ids, labels = samples.column("pair_id"), samples.column("answer_label")
    given, given_ids = _given_pairs(pair_ids)
    matched = _matched_singles(samples, np.flatnonzero(pair_ids < 0), seed)
    next_id = int(pair_ids.max(initial=-1)) + 1
    pairs = np.concatenate([given, matched])
    ids = np.concatenate([given_ids, np.arange(next_id, next_id + len(matched))])
    order = np.argsort(pairs.min(axis=1, initial=np.iinfo(np.int64).max), kind="stable")
    pairs, ids = np.sort(pairs[order], axis=1), ids[order]
    swapped = labels[pairs[:, 0]] < labels[pairs[:, 1]]
    pairs[swapped] = pairs[swapped, ::-1]
    return samples.select(pairs.ravel(), np.repeat(ids, 2))


def _given_pairs(pair_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P, 2] indices of the pairs of which both sides are there, and their ids."""
    order = np.argsort(pair_ids, kind="stable")
    order = order[pair_ids[order] >= 0]
    ids, first, counts = np.unique(pair_ids[order], return_index=True, return_counts=True)
    whole = counts == 2
    return order[first[whole, None] + np.arange(2)], ids[whole]


def _matched_singles(samples: Samples, singles: np.ndarray, seed: int) -> np.ndarray:
    """[P, 2] indices of right and wrong answers, problem by problem in the order in which problems appear."""
    problems, labels = samples.column("problem")[singles], samples.column("answer_label")[singles]
    numbers, first, counts = np.unique(problems, return_index=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    by_problem = np.argsort(problems, kind="stable")
    num_right = np.bincount(np.searchsorted(numbers, problems), labels, len(numbers)).astype(np.int64)
    pairs: list[tuple[int, int]] = []
    for place in np.argsort(first):
        if not 0 < num_right[place] < counts[place]:
            continue
        rows = by_problem[starts[place] : starts[place] + counts[place]]
        right, wrong = (singles[rows[labels[rows] == side]].tolist() for side in (1, 0))
        if len(right) > 1 or len(wrong) > 1:
            # Its own generator, seeded by text: another problem's answers do not change this one's matches.
            shuffled = random.Random(f"{seed} {samples.problem_id(int(numbers[place]))}")
            shuffled.shuffle(right)
            shuffled.shuffle(wrong)
        pairs += zip(right, wrong, strict=False)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def keep_labels(samples: Samples, keep: str) -> Samples:
    """The samples whose answer is ``positive``, ``negative``, or ``all`` of them."""
    return samples.select(np.flatnonzero(np.isin(samples.column("answer_label"), KEEP[keep])))
