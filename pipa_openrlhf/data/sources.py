"""Files, folders and hub names to rows.

JSON is read by this package, so that a message about a row can name its line; everything else by `datasets`.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipa_openrlhf.data import tables
from pipa_openrlhf.data.json_rows import decode, is_json_path, read_json_texts
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.remembered import file_stamp, remembered


def dataset_names(dataset: str | None) -> list[str]:
    """Files, folders and hub names of ``--data.dataset``.

    Raises:
        UserError: one is missing.
    """
    names = [name.strip() for name in (dataset or "").split(",")]
    if not all(names):
        raise UserError("--data.dataset is missing or has an empty name: give a file, a folder or a hub name")
    return names


def parse_probabilities(text: str, num_datasets: int) -> list[float]:
    """``--data.dataset_probs`` as numbers, one a data set.

    Raises:
        UserError: they are no probabilities of that many data sets.
    """
    flag = f"--data.dataset_probs {text}"
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}: give numbers with commas between them, such as 0.7,0.3") from None
    if len(weights) != num_datasets:
        raise UserError(f"{flag}: {len(weights)} probabilities for {num_datasets} data sets; give one for each")
    # A data set of probability 0 would never be exhausted, and the interleaving never end.
    if not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"{flag}: probabilities must be above 0 and add up to 1")
    return weights


@dataclass(frozen=True)
class Source:
    """One data set. ``rows`` starts again whenever it is called.

    Attributes:
        rows: ``(where, row)`` of every row that is to be read; JSON is still text, see :func:`as_row`.
        identity: digest of the content, and the number of rows; the argument is a JSON file that remembers them.
        size: number of rows, where it is known without reading.
    """

    name: str
    rows: Callable[[], Iterator[tuple[str, str | dict]]]
    identity: Callable[[str], tuple[str, int]]
    size: int | None = None

    def few_rows(self, most: int) -> int | None:
        """Number of rows, if it is at most ``most``; no more than that is read."""
        count = sum(1 for _ in itertools.islice(self.rows(), most + 1)) if self.size is None else self.size
        return count if count <= most else None


def open_sources(
    dataset: str | None, split: str, max_samples: int, use_ms: bool = False, streaming: bool = False
) -> list[Source]:
    """The data sets, each with its first ``max_samples`` rows.

    Args:
        dataset: files, folders or hub names, comma-separated.
        streaming: rows of other data than JSON files are taken as they come, whenever they are wanted; JSON always is.

    Raises:
        UserError: a data set does not exist, cannot be read or is empty.
    """
    sources = [_open_one(name, split, max_samples, use_ms, streaming) for name in dataset_names(dataset)]
    for source in sources:
        if next(source.rows(), None) is None:
            raise UserError(f"{source.name}: no rows; give a data set that has some")
    return sources


def as_row(where: str, row: str | dict) -> dict:
    """A row of a source.

    Raises:
        UserError: it is no JSON object.
    """
    return decode(row, where) if isinstance(row, str) else row


def rows_in_order(
    sources: list[Source], counts: list[int], probs: str | None, seed: int, max_samples: int
) -> Iterator[tuple[int, str, str | dict]]:
    """``(source, where, row)`` in OpenRLHF's order: data sets one after another, or interleaved by ``probs``.

    Args:
        counts: rows of each.
        max_samples: most rows of all together.

    Raises:
        UserError: ``probs`` are no probabilities of that many data sets.
    """
    rows = _in_turn(sources) if probs is None else _interleaved(sources, counts, probs, seed)
    return itertools.islice(rows, max_samples)


def _in_turn(sources: list[Source]) -> Iterator[tuple[int, str, str | dict]]:
    for number, source in enumerate(sources):
        for where, row in source.rows():
            yield number, where, row


def _interleaved(
    sources: list[Source], counts: list[int], probs: str, seed: int
) -> Iterator[tuple[int, str, str | dict]]:
    rows = [source.rows() for source in sources]
    for number in interleave_order(counts, parse_probabilities(probs, len(sources)), seed):
        found = next(rows[number], None)
        if found is None:
            # One that is exhausted before the others begins again.
            rows[number] = sources[number].rows()
            found = next(rows[number])
        yield number, *found


def interleave_order(counts: list[int], probs: list[float], seed: int) -> Iterator[int]:
    """Sources in the order of ``datasets.interleave_datasets``, which OpenRLHF uses; each gives its rows in order."""
    from datasets import Dataset, interleave_datasets  # takes a second to import: only where it is needed

    numbers = [
        Dataset.from_dict({"source": np.full(count, number, dtype=np.int32)}) for number, count in enumerate(counts)
    ]
    mixed = interleave_datasets(numbers, probabilities=probs, seed=seed, stopping_strategy="all_exhausted")
    for batch in mixed.with_format("numpy").iter(batch_size=10_000):
        yield from batch["source"].tolist()


def _open_one(name: str, split: str, max_samples: int, use_ms: bool, streaming: bool) -> Source:
    rows: Callable[[], Iterator[tuple[str, str | dict]]]
    about = f"first {max_samples} rows of {split} of"
    if is_json_path(name) and "://" not in name:
        path = os.path.realpath(name)
        rows = partial(_json_rows, name, split, max_samples)
        return Source(name, rows, partial(_identity_of_rows, f"{about} {path}", partial(file_stamp, path), rows))
    if streaming:
        rows = partial(tables.rows_of, name, tables.read_stream(name, split, use_ms), max_samples)
        return Source(name, rows, partial(_identity_of_rows, f"{about} {name}", partial(tables.stamp, name), rows))
    table = tables.read_table(name, split, max_samples, use_ms)
    rows = partial(tables.rows_of, name, table)
    return Source(name, rows, partial(_identity_of_table, f"{about} {name}", table), len(table))


def _json_rows(name: str, split: str, max_samples: int) -> Iterator[tuple[str, str]]:
    texts = itertools.islice(read_json_texts(name, split), max_samples)
    return ((f"{name} line {line}", text) for line, text in texts)


def _identity_of_rows(about: str, stamp: Callable[[], list], rows: Callable, memory_path: str) -> tuple[str, int]:
    def compute() -> str:
        digest, count = hashlib.sha256(), 0
        for where, row in rows():
            # With the line: an empty line before a row changes what messages say of it.
            text = row if isinstance(row, str) else repr(row)
            digest.update(f"{where.rsplit(' ', 1)[1]} {text}\n".encode(errors="surrogateescape"))
            count += 1
        return f"{digest.hexdigest()} {count}"

    digest, count = remembered(about, stamp(), memory_path, compute).split()
    return digest, int(count)


def _identity_of_table(about: str, table, memory_path: str) -> tuple[str, int]:
    """Hashed by one process at one start: the files that the table is mapped from tell whether it is the same."""
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return tables.digest_of(table), len(table)
    stamp = [[file, *file_stamp(file)] for file in files]
    return remembered(about, stamp, memory_path, lambda: tables.digest_of(table)), len(table)
