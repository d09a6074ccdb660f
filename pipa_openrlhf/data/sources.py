"""Files, folders and hub names to rows.

JSON is read here, so that a message about a row can name its line. Everything else goes through OpenRLHF's own
``blending_datasets``, one data set a call.
"""

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from pipa_openrlhf.data.json_rows import decode, is_json_path, read_json_texts
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.hub import hub_answers
from pipa_openrlhf.remembered import remembered

_FILES = (".csv", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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


def open_sources(dataset: str | None, split: str, max_samples: int, use_ms: bool = False) -> list[Source]:
    """The data sets, each with its first ``max_samples`` rows.

    Args:
        dataset: files, folders or hub names, comma-separated.

    Raises:
        UserError: a data set does not exist, cannot be read or is empty.
    """
    sources = [_open_one(name, split, max_samples, use_ms) for name in dataset_names(dataset)]
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


def _open_one(name: str, split: str, max_samples: int, use_ms: bool) -> Source:
    if is_json_path(name) and "://" not in name:
        rows = partial(_json_rows, name, split, max_samples)
        about = f" first {max_samples} rows of {split}"
        return Source(name, rows, partial(_json_identity, name, about, rows))
    table = _read_with_openrlhf(name, split, max_samples, use_ms)
    return Source(name, partial(_table_rows, name, table), lambda _: (_table_digest(table), len(table)), len(table))


def _json_rows(name: str, split: str, max_samples: int) -> Iterator[tuple[str, str]]:
    texts = itertools.islice(read_json_texts(name, split), max_samples)
    return ((f"{name} line {line}", text) for line, text in texts)


def _json_identity(name: str, about: str, rows: Callable, memory_path: str) -> tuple[str, int]:
    def compute() -> str:
        digest, count = hashlib.sha256(), 0
        for where, text in rows():
            # With the line: an empty line before a row changes what messages say of it.
            digest.update(f"{where.rsplit(' ', 1)[1]} {text}\n".encode(errors="surrogateescape"))
            count += 1
        return f"{digest.hexdigest()} {count}"

    digest, count = remembered(os.path.realpath(name), memory_path, compute, about).split()
    return digest, int(count)


def _table_rows(name: str, table) -> Iterator[tuple[str, dict]]:
    return ((f"{name} row {number}", row) for number, row in enumerate(table, start=1))


def _table_digest(table) -> str:
    """Of its content: the fingerprint of `datasets` is another one at every start."""
    import pyarrow

    digest = hashlib.sha256()
    sink = SimpleNamespace(write=digest.update, closed=False, flush=lambda: None)
    indices = np.arange(len(table)) if table._indices is None else table._indices.column(0).to_numpy()
    digest.update(np.ascontiguousarray(indices, dtype=np.int64).tobytes())
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(sink, mode="w"), table.data.schema) as stream:
        stream.write_table(table.data.table)
    return digest.hexdigest()


def _read_with_openrlhf(name: str, split: str, max_samples: int, use_ms: bool):
    """A table of `datasets`, which maps its files."""
    path = name.split("@")[0].strip()
    _check_path(path)
    if path.lower().endswith(_FILES) or is_json_path(path):
        split = "train"  # the name that `datasets` gives to the only split of a file
    is_remote = not os.path.exists(path) and "://" not in path and not use_ms
    reachable = not is_remote or _is_on_hub(path)
    with _quiet(offline=not reachable):
        try:
            return _load(name, split, max_samples, use_ms)
        except UserError:
            raise
        except Exception as error:  # `datasets` raises its readers' own exceptions, of any kind
            reason = first_line(error)
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


def _load_csv(path: str, columns: list[str], max_samples: int, **options):
    """Cells as they stand in the file: `datasets` would guess a number from "2" and nothing from "NA"."""
    from datasets import Features, Value, load_dataset

    features = Features({column: Value("string") for column in columns})
    table = load_dataset(path, features=features, keep_default_na=False, **options)
    return table.select(range(min(max_samples, len(table))))


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
    saved = os.path.join(path, "dataset_dict.json")
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
