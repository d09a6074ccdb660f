"""Rows that cannot be read: the end of the run, or counted and written down, as ``--data.on_error`` says."""

import json
import logging
import os
from collections import Counter

from pipa_openrlhf.errors import UserError

log = logging.getLogger(__name__)

FILE_NAME = "skipped_rows.jsonl"
_REASONS_SHOWN = 5


class BadRows:
    """What was wrong with which rows of a data set.

    Args:
        skip: go on without them; otherwise the first one ends the reading.

    Attributes:
        rows: place and reason of each.
        num_unparsed: how many of them are no JSON.
    """

    def __init__(self, skip: bool):
        self._skip = skip
        self.rows: list[tuple[str, str]] = []
        self.num_unparsed = 0

    def add_unparsed(self, where: str, error: UserError) -> None:
        """Note a text that did not become a row. Raises as :meth:`add` does."""
        self.add(where, error)
        self.num_unparsed += 1

    def add(self, where: str, error: UserError) -> None:
        """Note a row.

        Raises:
            UserError: ``error`` itself, where bad rows are not skipped.
        """
        if not self._skip:
            raise error
        self.rows.append((where, str(error).removeprefix(f"{where}: ")))

    def check_share(self, num_rows: int, most: float, dataset: str) -> None:
        """Say how many rows were skipped and why, and refuse more than ``most`` of ``num_rows``.

        Raises:
            UserError: there are more.
        """
        if not self.rows:
            return
        for reason, count in Counter(reason for _, reason in self.rows).most_common(_REASONS_SHOWN):
            log.info(f"{dataset}: skipped {count} of {num_rows} rows: {reason}")
        if len(self.rows) > most * num_rows:
            where, reason = self.rows[0]
            share = f"{len(self.rows)} of {num_rows} rows are bad, more than --data.max_error_share {most:g}"
            raise UserError(f"{where}: {reason}; {share}")


def write_bad_rows(folder: str, rows: list[tuple[str, str]]) -> None:
    """Write ``skipped_rows.jsonl``, a line a row with its place and the reason; nothing where there are none."""
    if not rows:
        return
    path = os.path.join(folder, FILE_NAME)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in rows)
    log.info(f"{len(rows)} rows were skipped: see {path}")
