"""What every layout yields: one prompt, one answer in steps, and their labels; and what becomes no record or sample.

A row that cannot be read ends the run, or is counted and written down, as ``--data.on_error`` says.
"""

import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.errors import UserError

log = logging.getLogger(__name__)

# Place, and what is wrong there.
BadRow = tuple[str, str]

_SKIPPED_ROWS = "skipped_rows.jsonl"
_REASONS_SHOWN = 5
_VALUE = re.compile(r" is (?:['\"\[{(]|-?\d|nan|inf).*")

# Where a record's labels come from.
FROM_COLUMN = "a column of labels"
FROM_SIDE = "its side of a pair"
FROM_STEPS = "its steps"
FROM_Q_VALUES = "Q values of its steps"


@dataclass(frozen=True)
class Record:
    """One answer to one prompt, before tokenisation.

    Attributes:
        prompt: text, or chat messages ``[{"role": ..., "content": ...}]``.
        steps: texts of the steps in order; an answer without steps is one step.
        step_labels: 1 (right), 0 (wrong) or None (outside every loss) a step; None where the data has none.
        answer_label: 1 (right, chosen) or 0 (wrong, rejected); None where the data do not say it of the whole answer.
        label_source: where the labels come from, one of the constants above.
        problem_id: answers with the same one belong to the same problem.
        where: file and line, for messages.
        complete: False: the answer goes on, so that no eos belongs after it.
        weight: multiplies the record's loss.
        own_spans: ``(start, end)`` in characters of a text prompt that the user's own template wrote: there, and
            nowhere else, special tokens are what they spell.
        pair_id: the two sides of a pair share it; None for a single answer.
        side: of a pair: 1 chosen, 0 rejected.
        masked_spans: ``(step, start, end)`` in characters of that step, text the model did not write.
        messages: the answer as chat messages, where the data gave it so without steps. None: the answer is ``steps``,
            which become one assistant message when the prompt is messages.
    """

    prompt: str | list[dict]
    steps: list[str]
    step_labels: list[int | None] | None
    answer_label: int | None
    problem_id: str
    where: str
    label_source: str = FROM_COLUMN
    complete: bool = True
    weight: float = 1.0
    pair_id: int | None = None
    side: int | None = None
    masked_spans: tuple[tuple[int, int, int], ...] = ()
    messages: list[dict] | None = None
    own_spans: tuple[tuple[int, int], ...] = ()

    @property
    def label(self) -> int | None:
        """1 or 0 of what was written: of the whole answer, or else of the side of a comparison that it is."""
        return self.side if self.answer_label is None else self.answer_label


class Unusable(Exception):
    """This tokenizer or its chat template cannot express the record; the message is the reason to count."""


class Dropped:
    """Records left out, counted by reason, with the place of the first of each kind."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, where: str, count: int = 1) -> None:
        self.counts[reason] += count
        self._first.setdefault(reason, where)

    def entries(self) -> list[tuple[str, str, int]]:
        """What :meth:`add` takes to make the same."""
        return [(reason, self._first[reason], count) for reason, count in self.counts.items()]

    def __str__(self) -> str:
        return "; ".join(
            f"{count} {reason} (first: {self._first[reason]})" for reason, count in self.counts.most_common()
        )


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
    path = os.path.join(folder, _SKIPPED_ROWS)
    if not bad:
        if os.path.exists(path):
            os.remove(path)  # of this run, before its data were put right
        return
    # A name of a column may be what no encoding has.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for where, problem in bad:
            row = {"where": where, "reason": _reason(where, problem)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    log.info(f"{len(bad)} rows were skipped: see {path}")


def _reason(where: str, problem: str) -> str:
    return problem.removeprefix(f"{where}: ")
