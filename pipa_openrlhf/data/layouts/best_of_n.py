"""Several whole answers in the columns that elsewhere hold steps; only by ``--data.format best_of_n``."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.answers import one_each
from pipa_openrlhf.data.record import Record

COLUMNS = ("completions", "labels")
READING = "a record for each of `completions`, whole answers; never by itself: say `--data.format best_of_n`"
EXAMPLE = {"prompt": "1+1=", "completions": ["2", "3"], "labels": [True, False]}


def fits(row: dict, flags: DataConfig) -> bool:
    """Nothing tells whole answers from steps for sure, so the user has to."""
    return flags.format == "best_of_n" and all(name in row for name in COLUMNS)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completions: [...], labels: [...]}``."""
    return one_each(row, "completions", flags.label_key or "labels", where, flags)
