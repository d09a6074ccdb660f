"""Files, folders and hub names to rows.

JSON is parsed here, so that a message about a row can name its line. Everything else goes through OpenRLHF's own
``blending_datasets``, one data set a call.
"""

import csv
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from pipa_openrlhf.data.bad_rows import BadRows
from pipa_openrlhf.data.json_rows import decode, is_json_path, read_json_texts
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.hub import hub_answers

log = logging.getLogger(__name__)

Rows = list[tuple[str, dict]]

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


class Source:
    """One data set, read row by row.

    Attributes:
        name: file, folder or hub name.
        sample: its first rows, at most ``sample_size``.
    """

    def __init__(self, name: str, rows: Iterator[tuple[str, dict]], sample_size: int):
        self.name = name
        self.sample = list(itertools.islice(rows, sample_size))
        self._rest = rows

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """``(where, row)`` of all rows; once."""
        count = 0
        for row in itertools.chain(self.sample, self._rest):
            count += 1
            yield row
        log.info(f"{self.name}: {count} rows")


def read_sources(
    dataset: str | None, split: str, max_samples: int, bad_rows: BadRows, use_ms: bool = False, sample_size: int = 1
) -> list[Source]:
    """The data sets, each with at most ``max_samples`` rows.

    Args:
        dataset: files, folders or hub names, comma-separated.

    Raises:
        UserError: a data set does not exist, cannot be read or is empty.
    """
    sources = []
    for name in dataset_names(dataset):
        is_json = is_json_path(name) and "://" not in name
        rows = (
            _read_json(name, split, max_samples, bad_rows)
            if is_json
            else _read_with_openrlhf(name, split, max_samples, use_ms)
        )
        source = Source(name, rows, sample_size)
        if not source.sample:
            raise UserError(f"{name}: no rows; give a data set that has some")
        sources.append(source)
    return sources


def rows_in_order(
    sources: list[Source], probs: str | None, seed: int, max_samples: int
) -> Iterator[tuple[int, str, dict]]:
    """``(source, where, row)`` in OpenRLHF's order: data sets one after another, or interleaved by ``probs``, which
    holds all rows in memory.

    Raises:
        UserError: ``probs`` are no probabilities of that many data sets.
    """
    if probs is None:
        in_turn = ((number, where, row) for number, source in enumerate(sources) for where, row in source)
        return itertools.islice(in_turn, max_samples)
    weights = parse_probabilities(probs, len(sources))
    rows = [list(source) for source in sources]
    order = interleave_order(rows, weights, seed)[:max_samples]
    return ((number, *rows[number][row]) for number, row in order)


def interleave_order(sources: list[Rows], probs: list[float], seed: int) -> list[tuple[int, int]]:
    """``(source, row)`` in the order of ``datasets.interleave_datasets``, which OpenRLHF uses."""
    from datasets import Dataset, interleave_datasets  # takes a second to import: only where it is needed

    indices = [
        Dataset.from_dict({"source": [number] * len(rows), "row": list(range(len(rows)))})
        for number, rows in enumerate(sources)
    ]
    mixed = interleave_datasets(indices, probabilities=probs, seed=seed, stopping_strategy="all_exhausted")
    return list(zip(mixed["source"], mixed["row"], strict=True))


def _read_json(name: str, split: str, max_samples: int, bad_rows: BadRows) -> Iterator[tuple[str, dict]]:
    for line, text in itertools.islice(read_json_texts(name, split), max_samples):
        where = f"{name} line {line}"
        try:
            row = decode(text, where)
        except UserError as error:
            bad_rows.add_unparsed(where, error)
        else:
            yield where, row


def _read_with_openrlhf(name: str, split: str, max_samples: int, use_ms: bool) -> Iterator[tuple[str, dict]]:
    path = name.split("@")[0].strip()
    _check_path(path)
    if path.lower().endswith(_FILES) or is_json_path(path):
        split = "train"  # the name that `datasets` gives to the only split of a file
    is_remote = not os.path.exists(path) and "://" not in path and not use_ms
    reachable = not is_remote or _is_on_hub(path)
    with _quiet(offline=not reachable):
        try:
            table = _load(name, split, max_samples, use_ms)
        except UserError:
            raise
        except Exception as error:  # `datasets` raises its readers' own exceptions, of any kind
            reason = first_line(error)
            if "Config name is missing" in reason:
                raise _several_configs(name, path) from error
            if not reachable:
                reason = "no such file or folder here, and the hub cannot be reached"
            raise UserError(f"{name}: cannot be read ({reason}); check the name, or give a local file") from error
    return ((f"{name} row {number}", row) for number, row in enumerate(table, start=1))


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
