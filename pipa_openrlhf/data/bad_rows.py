"""Rows that cannot be read: the end of the run, or counted and written down, as ``--data.on_error`` says."""

import json
import logging
import os
import re
from collections import Counter

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.errors import UserError

log = logging.getLogger(__name__)

# Place, and what is wrong there.
BadRow = tuple[str, str]

FILE_NAME = "skipped_rows.jsonl"
_REASONS_SHOWN = 5
_VALUE = re.compile(r" is (?:['\"\[{(]|-?\d|nan|inf).*")


def check_bad_rows(bad: list[BadRow], num_rows: float, dataset: str, flags: DataConfig) -> None:
    """Refuse bad rows, or more of them than ``--data.max_error_share`` of ``num_rows``.

    Raises:
        UserError: the first of them, and their number where bad rows are skipped.
    """
    if not bad:
        return
    where, problem = bad[0]
    if flags.on_error == "fail":
        raise UserError(problem)
    if len(bad) > flags.max_error_share * num_rows:
        share = f"{len(bad)} of {num_rows} rows are bad, more than --data.max_error_share {flags.max_error_share:g}"
        raise UserError(f"{problem}; {dataset}: {share}")


def report_bad_rows(bad: list[BadRow], num_rows: int, dataset: str) -> None:
    """Say how many rows were skipped, and why."""
    kinds = Counter(kind_of(where, problem) for where, problem in bad)
    for kind, count in kinds.most_common(_REASONS_SHOWN):
        log.info(f"{dataset}: skipped {count} of {num_rows} rows: {kind}")


def kind_of(where: str, problem: str) -> str:
    """What is wrong with a bad row, without what is of that row alone, so that rows can be counted by it."""
    what, _, remedy = _reason(where, problem).partition("; ")
    what = _VALUE.sub(" is ...", re.sub(r" \(.*?\)", "", what, flags=re.DOTALL))
    return re.sub(r"\d+", "N", what) + (f"; {remedy}" if remedy else "")


def write_bad_rows(folder: str, bad: list[BadRow]) -> None:
    """Write ``skipped_rows.jsonl``, a line a row with its place and the reason; nothing where there are none."""
    path = os.path.join(folder, FILE_NAME)
    if not bad:
        if os.path.exists(path):
            os.remove(path)  # of this run, before its data were put right
        return
    with open(path, "w", encoding="utf-8") as file:
        for where, problem in bad:
            row = {"where": where, "reason": _reason(where, problem)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    log.info(f"{len(bad)} rows were skipped: see {path}")


def _reason(where: str, problem: str) -> str:
    return problem.removeprefix(f"{where}: ")
