"""From data sets to columns of samples: few rows in this process, more of them once a node, into files.

A chunk of rows becomes packed samples in any process; nothing here imports torch, so that such a process starts soon.
"""

import hashlib
import inspect
import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from tokenizers import __version__ as tokenizers_version
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data import store
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import SAMPLE_SIZE, Reading, choose_reading
from pipa_openrlhf.data.record import BadRow, Dropped, Record, check_bad_rows, report_bad_rows
from pipa_openrlhf.data.samples import Columns, Gathered, pack
from pipa_openrlhf.data.sources import Source, as_row, rows_in_order
from pipa_openrlhf.data.special_text import spelled_in
from pipa_openrlhf.data.tokenise import is_plain, tokenise
from pipa_openrlhf.data.workers import CannotStart, Workers
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import MAY_CHANGE, settings_of

log = logging.getLogger(__name__)

# Rows up to which reading them again takes less than looking for them, and than starting processes.
FEW_ROWS, ROWS_OF_ONE_PROCESS = 2_000, 20_000
_CHUNK = 512
_TAKEN_AS = {"text": "read as text", "prompt": "that token in text prompts, and text elsewhere"}


@dataclass(frozen=True)
class RowChunk:
    """Rows ``(source, where, row)`` that follow each other; ``first`` is the number of the first one, from 0."""

    first: int
    rows: list[tuple[int, str, str | dict]]


@dataclass
class Counts:
    """What rows hold.

    Attributes:
        ties: rows without an answer to learn from, such as a comparison that ends in a tie.
        without_prompt: records whose prompt is empty.
        with_special: records with text that spells a special token.
    """

    rows: int = 0
    records: int = 0
    ties: int = 0
    without_prompt: int = 0
    with_special: int = 0

    def add(self, other: "Counts") -> None:
        """Count the other's too."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class SampleChunk:
    """What becomes of a chunk of rows.

    Attributes:
        counts: see :class:`Counts`.
        packed: see ``samples.pack``.
        dropped: records that became no sample.
        label_sources: how many records were labelled by what, see ``data/record.py``.
        bad: rows that cannot be read.
    """

    counts: Counts
    packed: dict[str, Any]
    dropped: Dropped
    label_sources: Counter[str]
    bad: list[BadRow]


@dataclass(frozen=True)
class Reader:
    """Reads chunks of rows; goes to other processes as it is.

    Attributes:
        readings: one a source.
    """

    readings: tuple[Reading, ...]
    tokenizer: PreTrainedTokenizerBase
    flags: DataConfig

    def __call__(self, chunk: RowChunk) -> SampleChunk:
        """Samples of the rows, up to the first bad one where that ends the run.

        Their order and content do not depend on how rows were cut into chunks.

        Raises:
            UserError: a flag or the tokenizer cannot be used.
        """
        counts, records, bad = Counts(), [], []
        for index, (source, where, row) in enumerate(chunk.rows, start=chunk.first):
            counts.rows += 1
            try:
                found = self._records(source, where, row, index)
            except UserError as error:
                bad.append((where, str(error)))
                if self.flags.on_error == "fail":
                    break
                continue
            records += found
            counts.ties += not found
        counts.records = len(records)
        counts.without_prompt = sum(not record.prompt for record in records)
        counts.with_special = sum(spelled_in(record, self.tokenizer) is not None for record in records)
        samples, dropped = tokenise(
            records,
            self.tokenizer,
            max_len=self.flags.max_len,
            annotation=self.flags.annotation,
            step_separator=self.flags.step_separator,
            special_tokens=self.flags.special_tokens,
        )
        return SampleChunk(counts, pack(samples), dropped, Counter(one.label_source for one in records), bad)

    def _records(self, source: int, where: str, row: str | dict, index: int) -> list[Record]:
        records = self.readings[source].records(as_row(where, row), where, index)
        if self.flags.annotation == "step":
            _check_step_labels(records)
        if self.flags.special_tokens == "refuse":
            _check_special_text(records, self.tokenizer)
        return records


@dataclass(frozen=True)
class Request:
    """What is read.

    Attributes:
        name: of all data sets, for messages.
        limit: most rows of all together.
        flags: with the templates that are used.
    """

    name: str
    sources: list[Source]
    probs: str | None
    seed: int
    limit: int
    flags: DataConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Prepared:
    """Samples of everything that was asked for.

    Attributes:
        formats: one a data set.
        bad: rows that were skipped.
    """

    samples: Columns
    formats: list[str]
    counts: Counts
    dropped: Dropped
    label_sources: Counter[str]
    bad: list[BadRow]


def prepare(request: Request) -> Prepared:
    """Read everything, or find what was read before.

    Raises:
        UserError: the data cannot be used, or bad rows are too many.
    """
    few = [source.few_rows(FEW_ROWS) for source in request.sources]
    counts = [count for count in few if count is not None]
    if len(counts) == len(few) and sum(counts) <= FEW_ROWS:
        reader = _reader(request, counts)
        gathered = Gathered()
        about = _read(request, reader, counts, gathered, processes=1)
        return _prepared(request, reader, Columns(gathered.arrays()), about)

    root = os.path.expanduser(request.flags.cache_dir)
    identities = _identities(request.sources, root)
    counts = [count for _, count in identities]
    reader = _reader(request, counts)

    def build(files: Gathered) -> dict:
        about = _read(request, reader, counts, files, _num_processes(request.flags, sum(counts)))
        if _identities(request.sources, root) != identities:
            raise UserError(f"{request.name}: the data changed while they were read; start again")
        return about

    return _prepared(request, reader, *store.open_or_build(root, _key(request, identities), build))


def _prepared(request: Request, reader: Reader, columns: Columns, about: dict) -> Prepared:
    dropped = Dropped()
    for entry in about["dropped"]:
        dropped.add(*entry)
    counts, bad = Counts(**about["counts"]), [(where, problem) for where, problem in about["bad"]]
    check_bad_rows(bad, counts.rows, request.name, request.flags)
    report_bad_rows(bad, counts.rows, request.name)
    if counts.with_special:
        log.info(
            f"{request.name}: {counts.with_special} answers or their prompts spell a special token, which is "
            f"{_TAKEN_AS[request.flags.special_tokens]} (--data.special_tokens {request.flags.special_tokens})"
        )
    formats = [reading.layout for reading in reader.readings]
    return Prepared(columns, formats, counts, dropped, Counter(about["label_sources"]), bad)


def _reader(request: Request, counts: list[int]) -> Reader:
    """How all data sets are read; says what they are read as."""
    for source, count in zip(request.sources, counts):
        log.info(f"{source.name}: {count} rows")
    readings = tuple(_choose(source, request) for source in request.sources)
    return Reader(readings, request.tokenizer, request.flags)


def _choose(source: Source, request: Request) -> Reading:
    sample: list[tuple[str, dict]] = []
    for where, row in islice(source.rows(), SAMPLE_SIZE):
        try:
            sample.append((where, as_row(where, row)))
        except UserError:
            if request.flags.on_error == "skip":
                continue
            if not sample:
                raise
            break  # it is reported when its turn comes
    if not sample:
        raise UserError(f"{source.name}: none of the first {SAMPLE_SIZE} rows can be read; check the file")
    return choose_reading(sample, source.name, request.flags)


def _read(request: Request, reader: Reader, row_counts: list[int], out: Gathered, processes: int) -> dict:
    """Add the samples of every row to ``out``, and say what there is to know of them."""
    counts, dropped, label_sources, bad = Counts(), Dropped(), Counter[str](), []
    rows = rows_in_order(request.sources, row_counts, request.probs, request.seed, request.limit)
    total = min(sum(row_counts), request.limit)
    bar = tqdm(desc="Preparing data", unit=" rows", total=total, disable=total <= FEW_ROWS or None)
    with closing(_read_chunks(reader, _chunks(rows), processes)) as chunks, bar:
        for chunk in chunks:
            counts.add(chunk.counts)
            bad += chunk.bad
            # Interleaved data sets have more rows than are counted beforehand.
            check_bad_rows(bad, total if request.probs is None else math.inf, request.name, request.flags)
            out.add(chunk.packed)
            for entry in chunk.dropped.entries():
                dropped.add(*entry)
            label_sources += chunk.label_sources
            bar.update(chunk.counts.rows)
    return {"counts": vars(counts), "dropped": dropped.entries(), "label_sources": label_sources, "bad": bad}


def _read_chunks(reader: Reader, chunks: Iterator[RowChunk], processes: int) -> Generator[SampleChunk, None, None]:
    if processes > 1:
        try:
            with Workers(reader, processes) as workers:
                yield from workers.read(chunks)
                return
        except CannotStart as error:
            log.info(f"--data.num_proc: one process prepares the data, others cannot be started ({error})")
    yield from map(reader, chunks)


def _chunks(rows: Iterator[tuple[int, str, str | dict]]) -> Iterator[RowChunk]:
    first = 0
    while some := list(islice(rows, _CHUNK)):
        yield RowChunk(first, some)
        first += len(some)


def _num_processes(flags: DataConfig, num_rows: int) -> int:
    if num_rows <= ROWS_OF_ONE_PROCESS:
        return 1
    return flags.num_proc or len(os.sched_getaffinity(0))


def _identities(sources: list[Source], root: str) -> list[tuple[str, int]]:
    """Digest and number of rows of each; what one process of the node finds out, the others read."""
    memory = os.path.join(root, "data_hashes.json")
    try:
        os.makedirs(root, exist_ok=True)
        with FileLock(f"{memory}.lock"):
            return [source.identity(memory) for source in sources]
    except OSError:
        return [source.identity(memory) for source in sources]  # a folder that can only be read


def _key(request: Request, identities: list[tuple[str, int]]) -> str:
    """Digest of everything that samples, and messages about them, follow from."""
    flags = request.flags
    decisive = {one.name: one.value(flags) for one in settings_of(flags) if one.spec.role != MAY_CHANGE}
    # The data sets are those of `identities`; pairs are made later; templates and layouts count by what they say.
    elsewhere = ("dataset", "dataset_probs", "dataset_split", "max_samples", "pairing")
    for name in (*elsewhere, "tokenizer_chat_template", "layout_module"):
        decisive.pop(name)
    order = None if request.probs is None else [request.probs, request.seed]
    parts = [
        [source.name for source in request.sources],
        identities,
        order,
        request.limit if sum(count for _, count in identities) > request.limit or order else None,
        decisive,
        Path(flags.layout_module).read_text() if flags.layout_module else None,
        tokenizer_id(request.tokenizer, flags.apply_chat_template),
        _code_id(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code_id() -> str:
    """Of the code that reads data, and of the libraries under it."""
    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers_version}".encode())
    for path in sorted(Path(__file__).parent.glob("**/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DATE = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")


def tokenizer_id(tokenizer: PreTrainedTokenizerBase, uses_template: bool) -> str:
    """Hex digest of everything that token ids depend on: vocabulary, rules, special tokens, chat template and date."""
    parts: list[object] = [type(tokenizer).__qualname__, tokenizer.eos_token, tokenizer.split_special_tokens]
    if is_plain(tokenizer):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({name: value for name, value in rules.items() if name not in ("truncation", "padding")})
    else:
        source = inspect.getsourcefile(type(tokenizer))
        parts.append(Path(source).read_text() if source else "")
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(map(Path, tokenizer.save_pretrained(folder))):
                if path.is_file():
                    parts.append([path.name, path.read_bytes().hex()])
    if uses_template:
        template = str(tokenizer.chat_template)
        parts.append([template, sorted(map(str, tokenizer.special_tokens_map.items())), _dates(tokenizer, template)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _dates(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """What the template writes of the time of the run: usually the day, which other runs of that day share."""
    if "strftime_now" not in template:
        return []
    now = getattr(tokenizer.apply_chat_template, "keywords", {}).get("strftime_now") or datetime.now().strftime
    formats = [form for _, form in _DATE.findall(template)]
    others = _DATE.sub("", template).replace("strftime_now is defined", "")
    return [now(form) for form in ("%c %f" if "strftime_now" in others else "", *formats)]


def _check_step_labels(records: list[Record]) -> None:
    """Refuse ``--data.annotation step`` on data without step labels.

    Raises:
        UserError: names the first record that has none.
    """
    for record in records:
        if record.step_labels is None:
            raise UserError(
                f"{record.where}: --data.annotation step, but this answer has no step labels; "
                "add them (labels, or rejected_labels in pairs) or use --data.annotation answer"
            )


def _check_special_text(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError: names the first record that spells a special token."""
    for record in records:
        if found := spelled_in(record, tokenizer):
            problem = f"its text holds {found!r}, a special token, and --data.special_tokens is refuse"
            raise UserError(f"{record.where}: {problem}; change the text, or give --data.special_tokens text")
