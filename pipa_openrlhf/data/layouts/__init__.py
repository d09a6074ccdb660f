"""Rows of every public layout to Records, one file a layout."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import alphamath, paired, stepwise, unpaired
from pipa_openrlhf.data.record import Record

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


def read_records(rows: list[tuple[str, dict]], flags: DataConfig) -> tuple[str, list[Record]]:
    """Format and Records of rows, in order; a bad row ends the reading.

    Raises:
        UserError: names file, line, the problem and what to do.
    """
    chosen = flags.format
    if chosen == "auto":
        where, row = rows[0]
        chosen = detect_format(row, where, flags)
    read = LAYOUTS[chosen]
    records = [record for index, (where, row) in enumerate(rows) for record in read(row, where, index, flags)]
    return chosen, records
