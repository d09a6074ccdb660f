"""From the data flags to samples: the one call that trainers and tools make."""

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import SeedConfig
from pipa_openrlhf.data.bad_rows import BadRows
from pipa_openrlhf.data.chat import use_chat_template
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import SAMPLE_SIZE, Reading, check_prompts, choose_reading
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.render import fill_template
from pipa_openrlhf.data.sources import read_sources, rows_in_order
from pipa_openrlhf.data.tokenise import Sample, tokenise
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
        bad_rows: place and reason of the rows that were skipped.
    """

    samples: list[Sample]
    dropped: dict[str, int]
    format: str
    num_records: int
    label_sources: Counter[str]
    bad_rows: list[tuple[str, str]]


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
    bad_rows = BadRows(skip=flags.on_error == "skip")
    sources = read_sources(dataset, split, limit, bad_rows, config.use_ms, SAMPLE_SIZE)
    readings = [choose_reading(source.sample, source.name, flags) for source in sources]
    pairing = "given" if pairs_only and flags.pairing == "auto" else flags.pairing
    read = _Records(readings, rows_in_order(sources, probs, config.train.seed, limit), bad_rows)
    samples, dropped = tokenise(
        _checked(read, str(dataset), pairing, flags.annotation),
        tokenizer,
        max_len=flags.max_len,
        annotation=flags.annotation,
        step_separator=flags.step_separator,
    )
    bad_rows.check_share(read.num_rows + bad_rows.num_unparsed, flags.max_error_share, str(dataset))
    check_prompts(read.num_without_prompt, read.num_records, str(dataset), flags)
    log.info(
        f"{dataset}: {len(samples)} answers kept" + (f", dropped {dropped}" if dropped.counts else ", none dropped")
    )
    if read.num_ties:
        log.info(f"{dataset}: {read.num_ties} {TIES}")
    if not samples:
        raise UserError(f"{dataset}: nothing left to train on, dropped {dropped}")
    counts = dict(dropped.counts) | ({TIES: read.num_ties} if read.num_ties else {})
    if pairing != "auto":
        samples = _pair(samples, config.train.seed, pairing, str(dataset), counts)
    samples = _keep(samples, keep, str(dataset), counts)
    return LoadedData(
        samples=samples,
        dropped=counts,
        format=", ".join(dict.fromkeys(reading.layout for reading in readings)),
        num_records=read.num_records,
        label_sources=read.label_sources,
        bad_rows=bad_rows.rows,
    )


class _Records:
    """Records of rows, made as they are asked for, and counted.

    Attributes:
        num_ties: rows that have none, such as a comparison that ends in a tie.
    """

    def __init__(self, readings: list[Reading], rows: Iterator[tuple[int, str, dict]], bad_rows: BadRows):
        self._readings, self._rows, self._bad_rows = readings, rows, bad_rows
        self.num_rows = self.num_records = self.num_ties = self.num_without_prompt = 0
        self.label_sources: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        for index, (source, where, row) in enumerate(self._rows):
            self.num_rows += 1
            try:
                records = self._readings[source].records(row, where, index)
            except UserError as error:
                self._bad_rows.add(where, error)
                continue
            self.num_records += len(records)
            self.num_ties += not records
            self.num_without_prompt += sum(not record.prompt for record in records)
            self.label_sources.update(record.label_source for record in records)
            yield from records


def _checked(records: Iterable[Record], dataset: str, pairing: str, annotation: str) -> Iterator[Record]:
    """The records, as long as they have what the flags ask of each.

    Raises:
        UserError: pairs or step labels are wanted, and a record is no side of a pair or has no step labels.
    """
    for record in records:
        if pairing == "given" and record.pair_id is None:
            raise UserError(
                f"{dataset} holds single answers and pairs are wanted: give --data.pairing match to match "
                "each right answer with a wrong one of the same problem"
            )
        if annotation == "step" and record.step_labels is None:
            raise UserError(
                f"{record.where}: --data.annotation step, but this answer has no step labels; "
                "add them (labels, or rejected_labels in pairs) or use --data.annotation answer"
            )
        yield record


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


def _pair(samples: list[Sample], seed: int, pairing: str, dataset: str, dropped: dict[str, int]) -> list[Sample]:
    paired = match_pairs(samples, seed)
    unmatched = len(samples) - len(paired)
    given = sum(sample.pair_id is not None for sample in samples) // 2
    right = sum(sample.answer_label for sample in samples) - len(paired) // 2
    log.info(
        f"{dataset}: {len(paired) // 2} pairs{' (as given)' if given else ''}, "
        f"dropped without a partner: {right} right and {unmatched - right} wrong answers"
    )
    if unmatched:
        dropped[f"without a partner (--data.pairing {pairing})"] = unmatched
    if not paired:
        raise UserError(f"{dataset}: --data.pairing {pairing} found no problem with a right and a wrong answer")
    return paired


def _keep(samples: list[Sample], keep: str, dataset: str, dropped: dict[str, int]) -> list[Sample]:
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


def match_pairs(samples: list[Sample], seed: int) -> list[Sample]:
    """Chosen, rejected, chosen, rejected, ...: only what has a partner, in the order of each pair's first member.

    Pairs that the data gave stay as they are. Single answers are matched at random within their problem; the result
    depends on ``seed`` and on the order of the samples, on nothing else.
    """
    given: dict[int, list[int]] = defaultdict(list)
    singles: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, sample in enumerate(samples):
        if sample.pair_id is None:
            singles[sample.problem_id][sample.answer_label].append(index)
        else:
            given[sample.pair_id].append(index)

    pairs = [(pair_id, sides) for pair_id, sides in given.items() if len(sides) == 2]
    next_id = max(given, default=-1) + 1
    for problem_id, (wrong, right) in singles.items():
        # Its own generator, seeded by text: another problem's answers do not change this one's matches.
        shuffled = random.Random(f"{seed} {problem_id}")
        shuffled.shuffle(right)
        shuffled.shuffle(wrong)
        for sides in zip(right, wrong, strict=False):
            pairs.append((next_id, list(sides)))
            next_id += 1
    pairs.sort(key=lambda pair: min(pair[1]))
    return [
        replace(samples[index], pair_id=pair_id)
        for pair_id, sides in pairs
        for index in sorted(sides, key=lambda index: -samples[index].answer_label)
    ]


def keep_labels(samples: list[Sample], keep: str) -> list[Sample]:
    """The samples whose answer is ``positive``, ``negative``, or ``all`` of them."""
    return [sample for sample in samples if sample.answer_label in KEEP[keep]]
