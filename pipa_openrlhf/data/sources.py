"""Files, folders and hub names to rows.

JSON is read by this package, so that a message about a row can name its line; everything else by `datasets`: Parquet,
CSV and Arrow files, folders, and the hub.
"""

import csv
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipa_openrlhf.data.config import dataset_names, parse_probabilities
from pipa_openrlhf.data.json_rows import decode, is_json_path, read_json_texts
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.remembered import file_stamp, hub_answers, remembered

_FILES = (".csv", ".parquet", ".arrow")
_SAVED_SPLITS = "dataset_dict.json"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
        rows = partial(rows_of, name, _read_stream(name, split, use_ms), max_samples)
        return Source(name, rows, partial(_identity_of_rows, f"{about} {name}", partial(_stamp, name), rows))
    table = read_table(name, split, max_samples, use_ms)
    rows = partial(rows_of, name, table)
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
        return digest_of(table), len(table)
    stamp = [[file, *file_stamp(file)] for file in files]
    return remembered(about, stamp, memory_path, lambda: digest_of(table)), len(table)


def rows_of(name: str, table, most: int | None = None) -> Iterator[tuple[str, dict]]:
    """``(where, row)`` of the first ``most`` rows (unset: all) of a table or stream."""
    return ((f"{name} row {number}", row) for number, row in enumerate(itertools.islice(table, most), start=1))


def digest_of(table) -> str:
    """Of its content: the fingerprint of `datasets` is another one at every start."""
    import pyarrow

    digest = hashlib.sha256()
    sink = SimpleNamespace(write=digest.update, closed=False, flush=lambda: None)
    indices = np.arange(len(table)) if table._indices is None else table._indices.column(0).to_numpy()
    digest.update(np.ascontiguousarray(indices, dtype=np.int64).tobytes())
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(sink, mode="w"), table.data.schema) as stream:
        stream.write_table(table.data.table)
    return digest.hexdigest()


def _stamp(name: str) -> list:
    """Changes whenever the data set does: of local files, their stamps; of one of the hub, its commit."""
    path = name.split("@")[0].strip()
    if os.path.isdir(path):
        files = sorted(os.path.join(folder, file) for folder, _, found in os.walk(path) for file in found)
        return [[file, *file_stamp(file)] for file in files]
    if os.path.isfile(path):
        return file_stamp(os.path.realpath(path))
    from huggingface_hub import HfApi

    return [HfApi().dataset_info(path).sha]


def read_table(name: str, split: str, max_samples: int, use_ms: bool):
    """A table of `datasets`, which maps its files, by OpenRLHF's own ``blending_datasets``.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    return _read(name, use_ms, lambda wanted: _load(name, wanted, max_samples, use_ms), split)


def _read_stream(name: str, split: str, use_ms: bool):
    """A stream of `datasets`: nothing is written to the disk, and its rows may be gone through again.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    if use_ms:
        raise UserError("--data.streaming takes data sets of the Hugging Face hub: remove --use_ms")
    # What `save_to_disk` wrote is mapped, not copied: there is nothing to stream.
    if any(os.path.isfile(os.path.join(name, saved)) for saved in (_SAVED_SPLITS, "state.json")):
        return read_table(name, split, sys.maxsize, use_ms)
    return _read(name, use_ms, lambda wanted: _load_stream(name, wanted), split)


def _read(name: str, use_ms: bool, load: Callable[[str], Any], split: str):
    path = name.split("@")[0].strip()
    _check_path(path)
    if path.lower().endswith(_FILES) or is_json_path(path):
        split = "train"  # the name that `datasets` gives to the only split of a file
    is_remote = not os.path.exists(path) and "://" not in path and not use_ms
    reachable = not is_remote or _is_on_hub(path)
    with _quiet(offline=not reachable):
        try:
            return load(split)
        except UserError:
            raise
        except Exception as error:  # `datasets` raises its readers' own exceptions, of any kind
            reason = first_line(error.__cause__ or error)  # `datasets` wraps what a reader says of a file
            if "Config name is missing" in reason:
                raise _several_configs(name, path) from error
            if not reachable:
                reason = "no such file or folder here, and the hub cannot be reached"
            raise UserError(f"{name}: cannot be read ({reason}); check the name, or give a local file") from error


def _load(name: str, split: str, max_samples: int, use_ms: bool):
    """The wanted split; where it is missing, the only one there is."""
    # Messages are ours: OpenRLHF's own print of every table adds nothing to them.
    strategy = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=SimpleNamespace(use_ms=use_ms))
    is_csv_file = name.lower().endswith(".csv")
    if is_csv_file and os.path.isfile(name):
        return _load_csv("csv", _csv_header(name), max_samples, data_files=name, split=split)
    from pipa_openrlhf.distributed.upstream import blending_datasets

    try:
        table = blending_datasets(name, None, strategy, max_count=max_samples, dataset_split=split)
    except AttributeError:
        # What it raises when it selects rows of a DatasetDict, because the wanted split is not in it.
        splits = _split_names(name)
        if len(splits) != 1:
            problem = f"no split {split!r}, it has {', '.join(splits)}"
            raise UserError(f"{name}: {problem}; choose one by --data.dataset_split") from None
        split = splits[0]
        table = blending_datasets(name, None, strategy, max_count=max_samples, dataset_split=split)
    if getattr(table, "builder_name", None) == "csv":
        path, _, data_dir = (part.strip() for part in name.partition("@"))
        path, place = ("csv", {"data_files": name}) if is_csv_file else (path, {"data_dir": data_dir or None})
        return _load_csv(path, table.column_names, max_samples, split=split, **place)
    return table


def _load_stream(name: str, split: str):
    """The wanted split; where it is missing, the only one there is."""
    from datasets import load_dataset

    path, _, data_dir = (part.strip() for part in name.partition("@"))
    options: dict[str, Any] = {"data_dir": data_dir or None, "streaming": True}
    if os.path.isfile(path):
        kind = os.path.splitext(path)[1].lower().lstrip(".")
        path, options = kind, {"data_files": path, "streaming": True}
    splits = load_dataset(path, **options)
    if split not in splits:
        if len(splits) != 1:
            problem = f"no split {split!r}, it has {', '.join(splits)}"
            raise UserError(f"{name}: {problem}; choose one by --data.dataset_split")
        (split,) = splits
    stream = splits[split]
    if stream.info.builder_name == "csv":
        return load_dataset(path, split=split, **options, **_cells(next(iter(stream))))
    return stream


def _load_csv(path: str, columns: list[str], max_samples: int, **options):
    from datasets import load_dataset

    table = load_dataset(path, **options, **_cells(columns))
    return table.select(range(min(max_samples, len(table))))


def _cells(columns: Iterable[str]) -> dict[str, Any]:
    """Cells as they stand in the file: `datasets` would guess a number from "2" and nothing from "NA"."""
    from datasets import Features, Value

    return {"features": Features({column: Value("string") for column in columns}), "keep_default_na": False}


def _csv_header(path: str) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _several_configs(name: str, path: str) -> UserError:
    from datasets import get_dataset_config_names

    configs = ", ".join(get_dataset_config_names(path))
    return UserError(f"{name}: it holds several configs ({configs}); give the folder of one as {path}@FOLDER")


def _split_names(name: str) -> list[str]:
    from datasets import get_dataset_split_names

    path, _, data_dir = (part.strip() for part in name.partition("@"))
    saved = os.path.join(path, _SAVED_SPLITS)
    if os.path.isfile(saved):
        with open(saved, encoding="utf-8") as file:
            return json.load(file)["splits"]
    return get_dataset_split_names(path, **({"data_dir": data_dir} if data_dir else {}))


def _check_path(path: str) -> None:
    """Say at once what can be said without the network."""
    if path.endswith(".py") or os.path.isfile(os.path.join(path, f"{os.path.basename(path)}.py")):
        raise UserError(f"{path}: data-set scripts are not run; convert the data to JSONL or Parquet")
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{path}: permission denied; check the folder's permissions")
        if not any(files for _, _, files in os.walk(path)):
            raise UserError(f"{path}: the folder is empty; put JSONL or Parquet files there")
    elif os.path.isfile(path):
        if not path.lower().endswith(_FILES):
            raise UserError(f"{path}: unknown kind of file; give .jsonl, .json, .parquet, .csv or .arrow")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: permission denied; check the file's permissions")
    elif "://" not in path and (path.lower().endswith(_FILES) or not _HUB_NAME.fullmatch(path)):
        raise UserError(f"{path}: no such file or folder; check --data.dataset")


def _is_on_hub(name: str) -> bool:
    """Whether the hub can be reached, without the half minute of retries that loading would spend on it.

    Raises:
        UserError: it can, and has no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not hub_answers():
        return False
    try:
        HfApi().dataset_info(name)
    except RepositoryNotFoundError:
        remedy = "check the name, or set HF_TOKEN if it is private"
        raise UserError(f"{name}: no such file or folder here and no such data set on the hub; {remedy}") from None
    except Exception:  # it answered: loading will say what is wrong
        pass
    return True


@contextmanager
def _quiet(offline: bool):
    """No progress bars; ``offline`` lets a data set that was downloaded before come from the cache at once."""
    import datasets
    from datasets.utils import are_progress_bars_disabled

    was_offline = datasets.config.HF_HUB_OFFLINE
    had_bars = not are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()
