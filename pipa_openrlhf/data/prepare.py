"""From data sets to columns of samples: few rows in this process, more of them once a node, into files."""

import hashlib
import inspect
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import transformers
from filelock import FileLock
from tokenizers import __version__ as tokenizers_version
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import store
from pipa_openrlhf.data.exact import is_plain
from pipa_openrlhf.data.layouts import Reading, choose_reading
from pipa_openrlhf.data.reading import Reader, Renaming, RowChunk, SampleChunk, kind_of, named_row
from pipa_openrlhf.data.record import Dropped
from pipa_openrlhf.data.samples import Columns, Gathered
from pipa_openrlhf.data.sources import Source, merged_rows
from pipa_openrlhf.data.workers import CannotStart, Workers
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import MAY_CHANGE, settings_of

log = logging.getLogger(__name__)

# Rows up to which reading them again takes less than looking for them, and than starting processes.
FEW_ROWS, ROWS_OF_ONE_PROCESS = 2_000, 20_000
_CHUNK = 512
_SAMPLE = 100  # rows by which the reading of a data set is chosen


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
    rename: Renaming | None = None

    @property
    def skips(self) -> bool:
        """Whether bad rows are left out."""
        return self.flags.on_error == "skip"


@dataclass
class Prepared:
    """Samples of everything that was asked for.

    Attributes:
        formats: one a data set.
        bad: where, and what is wrong, of each bad row.
    """

    samples: Columns
    formats: list[str]
    num_rows: int
    num_records: int
    dropped: Dropped
    label_sources: Counter[str]
    bad: list[tuple[str, str]]


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
    prepared = Prepared(
        columns,
        [reading.layout for reading in reader.readings],
        about["num_rows"],
        about["num_records"],
        dropped,
        Counter(about["label_sources"]),
        [(where, problem) for where, problem in about["bad"]],
    )
    if prepared.bad:
        _check_bad(request, prepared.bad, prepared.num_rows)
        _report_bad(request, prepared.bad, prepared.num_rows)
    return prepared


def _reader(request: Request, counts: list[int]) -> Reader:
    """How all data sets are read; says what they are read as."""
    for source, count in zip(request.sources, counts):
        log.info(f"{source.name}: {count} rows")
    readings = tuple(_choose(source, request) for source in request.sources)
    return Reader(readings, request.tokenizer, request.flags, request.skips, request.rename)


def _choose(source: Source, request: Request) -> Reading:
    sample: list[tuple[str, dict]] = []
    for where, row in islice(source.rows(), _SAMPLE):
        try:
            sample.append((where, named_row(where, row, request.rename)))
        except UserError:
            if request.skips:
                continue
            if not sample:
                raise
            break  # the first bad row is reported when its turn comes
    if not sample:
        raise UserError(f"{source.name}: none of the first {_SAMPLE} rows can be read; check the file")
    return choose_reading(sample, source.name, request.flags)


def _read(request: Request, reader: Reader, counts: list[int], out: Gathered, processes: int) -> dict:
    """Add the samples of every row to ``out``, and say what there is to know of them."""
    dropped, label_sources, bad = Dropped(), Counter[str](), []
    num_rows = num_records = 0
    rows = merged_rows(request.sources, counts, request.probs, request.seed, request.limit)
    total = min(sum(counts), request.limit)
    bar = tqdm(desc="Preparing data", unit=" rows", total=total, disable=total <= FEW_ROWS or None)
    with closing(_read_chunks(reader, _chunks(rows), processes)) as chunks, bar:
        for chunk in chunks:
            num_rows += chunk.num_rows
            bad += chunk.bad
            if bad:
                # What is interleaved has more rows than are counted beforehand.
                _check_bad(request, bad, total if request.probs is None else sys.maxsize)
            out.add(chunk.packed)
            for entry in chunk.dropped.entries():
                dropped.add(*entry)
            label_sources += chunk.label_sources
            num_records += chunk.num_records
            bar.update(chunk.num_rows)
    return {
        "num_rows": num_rows,
        "num_records": num_records,
        "dropped": dropped.entries(),
        "label_sources": label_sources,
        "bad": bad,
    }


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


def _check_bad(request: Request, bad: list[tuple[str, str]], num_rows: int) -> None:
    problem, most = bad[0][1], request.flags.max_error_share
    if not request.skips:
        raise UserError(problem)
    if len(bad) > most * num_rows:
        raise UserError(
            f"{request.name}: {len(bad)} bad rows so far, more than --data.max_error_share {most:g} of {num_rows}; "
            f"the first: {problem}"
        )


def _report_bad(request: Request, bad: list[tuple[str, str]], num_rows: int) -> None:
    kinds = Counter(kind_of(problem, where) for where, problem in bad)
    shown = ", ".join(f"{count} [{kind}]" for kind, count in kinds.most_common())
    log.info(f"{request.name}: {len(bad)} of {num_rows} rows are bad and skipped: {shown}; the first: {bad[0][0]}")


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
    # The data sets are those of `identities`; pairs are made later; the template's text is the tokenizer's.
    for name in ("dataset", "dataset_probs", "dataset_split", "max_samples", "pairing", "tokenizer_chat_template"):
        decisive.pop(name)
    order = None if request.probs is None else [request.probs, request.seed]
    parts = [
        [source.name for source in request.sources],
        identities,
        order,
        request.limit if sum(count for _, count in identities) > request.limit or order else None,
        decisive,
        repr(request.rename),
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
