"""A chunk of rows to packed samples: the work that is shared out over processes. Nothing here imports torch."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts import Reading
from pipa_openrlhf.data.record import Dropped, Record
from pipa_openrlhf.data.samples import pack
from pipa_openrlhf.data.sources import as_row
from pipa_openrlhf.data.tokenise import tokenise
from pipa_openrlhf.errors import UserError

Renaming = Callable[[list[tuple[str, dict]]], list[tuple[str, dict]]]


@dataclass(frozen=True)
class RowChunk:
    """Rows ``(source, where, row)`` that follow each other; ``first`` is the number of the first one, from 0."""

    first: int
    rows: list[tuple[int, str, str | dict]]


@dataclass
class SampleChunk:
    """What becomes of a chunk of rows.

    Attributes:
        packed: see ``samples.pack``.
        bad: where, and what is wrong, of each row that cannot be read.
    """

    num_rows: int
    num_records: int
    packed: dict[str, Any]
    dropped: Dropped
    label_sources: Counter[str]
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """Reads chunks of rows; goes to other processes as it is.

    Attributes:
        readings: one a source.
        skips: reading goes on after a bad row.
        rename: gives rows the columns that the layouts know.
    """

    readings: tuple[Reading, ...]
    tokenizer: PreTrainedTokenizerBase
    flags: DataConfig
    skips: bool
    rename: Renaming | None = None

    def __call__(self, chunk: RowChunk) -> SampleChunk:
        """Samples of the rows. Their order and content do not depend on how rows were cut into chunks.

        Raises:
            UserError: a flag or the tokenizer cannot be used.
        """
        records: list[Record] = []
        bad: list[tuple[str, str]] = []
        for index, (source, where, row) in enumerate(chunk.rows, start=chunk.first):
            try:
                records += self._records(source, where, row, index)
            except UserError as error:
                bad.append((where, str(error)))
                if not self.skips:
                    break
        samples, dropped = tokenise(
            records,
            self.tokenizer,
            max_len=self.flags.max_len,
            annotation=self.flags.annotation,
            step_separator=self.flags.step_separator,
        )
        sources = Counter(one.label_source for one in records)
        return SampleChunk(len(chunk.rows), len(records), pack(samples), dropped, sources, bad)

    def _records(self, source: int, where: str, row: str | dict, index: int) -> list[Record]:
        records = self.readings[source].records(named_row(where, row, self.rename), where, index)
        if self.flags.annotation == "step":
            check_step_labels(records)
        return records


def named_row(where: str, row: str | dict, rename: Renaming | None) -> dict:
    """A row of a source, with the columns that the layouts know.

    Raises:
        UserError: it is no JSON object.
    """
    found = as_row(where, row)
    return rename([(where, found)])[0][1] if rename else found


def check_step_labels(records: list[Record]) -> None:
    """Refuse ``--data.annotation step`` on data without step labels.

    Raises:
        UserError: names the first record that has none.
    """
    for record in records:
        if record.step_labels is None:
            raise UserError(
                f"{record.where}: --data.annotation step, but this answer has no step labels; "
                "add them (labels, or rejected_labels in pairs) or use --data.annotation answer"
            )


_VALUE = re.compile(r" is (?:['\"\[{(]|-?\d|nan|inf).*")


def kind_of(problem: str, where: str) -> str:
    """What is wrong with a bad row, without what is of that row alone, so that rows can be counted by it."""
    what, _, remedy = problem.removeprefix(f"{where}: ").partition("; ")
    what = _VALUE.sub(" is ...", re.sub(r" \(.*?\)", "", what, flags=re.DOTALL))
    return re.sub(r"\d+", "N", what) + (f"; {remedy}" if remedy else "")
