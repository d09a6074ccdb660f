"""Rows of every public layout to Records, one file a layout."""

import logging
from dataclasses import dataclass

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import alphamath, paired, stepwise, unpaired
from pipa_openrlhf.data.record import Record

log = logging.getLogger(__name__)

# By the name that `--data.format` takes, in the order in which columns are looked for.
LAYOUTS = {"paired": paired.read, "stepwise": stepwise.read, "unpaired": unpaired.read, "alphamath": alphamath.read}


def detect_format(row: dict, where: str, flags: DataConfig) -> str:
    """The format whose columns the row has.

    Raises:
        UserError: it has those of none.
    """
    needed = {
        "paired": (flags.chosen_key, flags.rejected_key),
        "stepwise": stepwise.COLUMNS,
        "unpaired": unpaired.COLUMNS,
        "alphamath": alphamath.COLUMNS,
    }
    for name, columns in needed.items():
        if all(column in row for column in columns):
            return name
    wanted = ", ".join(f"{name} ({' and '.join(columns)})" for name, columns in needed.items())
    problem = f"no known format has the columns {', '.join(map(str, row)) or '(none)'}"
    return fields.refuse(where, problem, f"rename them to those of one of {wanted}")


@dataclass(frozen=True)
class Reading:
    """How the rows of one data set are read."""

    layout: str
    flags: DataConfig

    def records(self, row: dict, where: str, index: int) -> list[Record]:
        """Records of a row; ``index`` is its number over all data sets.

        Raises:
            UserError: names file, line, the problem and what to do.
        """
        return LAYOUTS[self.layout](row, where, index, self.flags)


def choose_reading(sample: list[tuple[str, dict]], dataset: str, flags: DataConfig) -> Reading:
    """How a data set is read, by its first rows; logs what was chosen.

    Raises:
        UserError: no format has its columns.
    """
    where, row = sample[0]
    chosen = detect_format(row, where, flags) if flags.format == "auto" else flags.format
    why = "by its columns" if flags.format == "auto" else "by --data.format"
    log.info(f"{dataset}: format {chosen} ({why}: {', '.join(map(str, row))})")
    return Reading(chosen, flags)


def read_records(rows: list[tuple[str, dict]], flags: DataConfig) -> tuple[str, list[Record]]:
    """Format and Records of rows, in order; a bad row ends the reading.

    Raises:
        UserError: names file, line, the problem and what to do.
    """
    reading = choose_reading(rows[:100], "the data", flags)
    return reading.layout, [
        record for index, (where, row) in enumerate(rows) for record in reading.records(row, where, index)
    ]
