"""Rows of every public layout to Records, one file a layout.

A layout is a module with ``COLUMNS`` (for messages), ``READING`` and ``EXAMPLE`` (for the docs), ``fits(row, flags)``,
``read(row, where, index, flags)`` and, where a choice depends on many rows, ``choose(rows, flags, dataset)``, which
returns the flags with the choice made.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from types import ModuleType

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.unlabelled import why_unlabelled
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.errors import UserError, first_line

log = logging.getLogger(__name__)

# By the names that `--data.format` takes. Their order decides nothing: no row fits two of them.
LAYOUTS = (
    "paired",
    "stepwise",
    "unpaired",
    "alphamath",
    "prm800k",
    "rated_steps",
    "tagged",
    "first_error",
    "wrong_spans",
    "sign_turns",
    "mc_tree",
    "rollouts",
    "step_dpo",
    "compared",
    "summaries",
    "ranked",
    "answers",
    "resampled",
    "best_of_n",
    "model_solutions",
)

# Rows that decide the layout of a data set.
SAMPLE_SIZE = 100
# Most records with an empty prompt, as a share of all.
MOST_EMPTY_PROMPTS = 0.01


# What values of a kind that a layout does not expect lead to.
_ODD_VALUES = (TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError)


class Row(dict):
    """A row that knows which of its columns were read."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> object:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        self.read.add(name)
        return super().get(name, default)


@dataclass(frozen=True)
class Reading:
    """How the rows of one data set are read.

    Attributes:
        layout: its name.
        flags: with every choice made that the data decide.
    """

    layout: str
    flags: DataConfig

    def records(self, row: dict, where: str, index: int) -> list[Record]:
        """Records of one row, the ``index``-th of all data sets.

        Raises:
            UserError: names file, line, the problem and what to do.
        """
        layout = _layout(self.layout, self.flags.layout_module)
        try:
            return layout.read(row, where, index, self.flags)
        except _ODD_VALUES as error:
            problem = f"it cannot be read as {self.layout} ({type(error).__name__}: {first_line(error)})"
            return fields.refuse(where, problem, "correct the row, remove it, or choose another --data.format")


def layout_names(flags: DataConfig) -> tuple[str, ...]:
    """What ``--data.format`` takes, the user's own layout first."""
    return ((_own_name(flags.layout_module),) if flags.layout_module else ()) + LAYOUTS


def choose_reading(sample: list[tuple[str, dict]], dataset: str, flags: DataConfig) -> Reading:
    """The layout of a data set and the choices that its rows decide, said in the log.

    Args:
        sample: its first rows, at least one, at most :data:`SAMPLE_SIZE`.

    Raises:
        UserError: no layout fits, or more than one; or the prompts are empty.
    """
    rows = [row for _, row in sample]
    if flags.format == "auto":
        name = _detect(sample, flags)
    elif flags.format in layout_names(flags):
        name = flags.format
    else:
        raise UserError(f"--data.format {flags.format}: unknown; give auto or one of {', '.join(layout_names(flags))}")
    choose: Callable[..., DataConfig] | None = getattr(_layout(name, flags.layout_module), "choose", None)
    chosen = choose(rows, flags, dataset) if choose else flags
    reading = Reading(name, chosen)
    tracked, empty, count = [], 0, 0
    for number, (where, row) in enumerate(sample):
        try:
            records = reading.records(watched := Row(row), where, number)
        except UserError:
            continue  # it is met again, in its turn, where it counts
        tracked.append(watched)
        count += len(records)
        empty += sum(not record.prompt for record in records)
    check_prompts(empty, count, dataset, flags)
    _report(reading, tracked, dataset, flags)
    return reading


def check_prompts(empty: int, count: int, dataset: str, flags: DataConfig) -> None:
    """Refuse data whose prompts are empty.

    Raises:
        UserError: there are more than one in a hundred, and ``--data.allow_empty_prompt`` was not given.
    """
    if empty > MOST_EMPTY_PROMPTS * count and not flags.allow_empty_prompt:
        raise UserError(
            f"{dataset}: {empty} of {count} answers have an empty prompt; name its column by --data.prompt_key, or "
            "give --data.allow_empty_prompt"
        )


def _detect(sample: list[tuple[str, dict]], flags: DataConfig) -> str:
    """The layout that fits most rows of the sample; one of the user's own goes before the others."""
    votes = {
        name: sum(_fits(_layout(name, flags.layout_module), row, flags) for _, row in sample)
        for name in layout_names(flags)
    }
    most = max(votes.values())
    if most == 0:
        where, row = sample[0]
        other = (_no_layout(row), "rename them, see docs/data.md, or give --data.layout_module")
        return fields.refuse(where, *(why_unlabelled(row) or other))
    if flags.layout_module and votes[_own_name(flags.layout_module)]:
        return _own_name(flags.layout_module)
    best = [name for name, count in votes.items() if count == most]
    if len(best) > 1:
        where, _ = sample[0]
        fields.refuse(where, f"the rows may be {' or '.join(best)}", f"choose by --data.format {best[0]}")
    return best[0]


def _fits(layout: ModuleType, row: dict, flags: DataConfig) -> bool:
    try:
        return layout.fits(row, flags)
    except _ODD_VALUES:
        return False


def _no_layout(row: dict) -> str:
    known = ", ".join(
        f"{name} ({' and '.join(_layout(name, None).COLUMNS)})" for name in ("paired", "stepwise", "unpaired")
    )
    return f"no known format has the columns {fields.column_names(row)}: neither {known} nor another"


def _report(reading: Reading, rows: list[Row], dataset: str, given: DataConfig) -> None:
    if not rows:
        return  # nothing could be read: the first row's error says more
    why = "by its columns" if given.format == "auto" else "by --data.format"
    present = {name: None for row in rows for name in row}
    read = [name for name in present if any(name in row.read for row in rows)]
    log.info(f"{dataset}: format {reading.layout} ({why}: {fields.column_names(read)})")
    for field in dataclass_fields(given):
        value = getattr(reading.flags, field.name)
        if value != getattr(given, field.name):
            log.info(f"{dataset}: --data.{field.name} {value}, decided by the rows")
    unread = [name for name in present if name not in read]
    if unread:
        log.info(f"{dataset}: not read: {fields.column_names(unread)}")


@lru_cache
def _layout(name: str, own: str | None) -> ModuleType:
    if own and name == _own_name(own):
        return _load_own(own)
    return importlib.import_module(f"{__name__}.{name}")


def _own_name(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _load_own(path: str) -> ModuleType:
    """The module of ``--data.layout_module``.

    Raises:
        UserError: there is none, or it is no layout.
    """
    flag = f"--data.layout_module {path}"
    name = f"pipa_layout_{_own_name(path)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UserError(f"{flag}: no such Python file; check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's program: it may raise anything
        raise UserError(f"{flag}: cannot be imported ({first_line(error)}); correct it") from error
    missing = [function for function in ("fits", "read") if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(f"{flag}: it has no {' and no '.join(missing)}; see docs/data.md")
    return module
