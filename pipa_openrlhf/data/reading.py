"""A chunk of rows to packed samples: the work that is shared out over processes. Nothing here imports torch."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import Reading
from pipa_openrlhf.data.record import BadRow, Dropped, Record
from pipa_openrlhf.data.samples import pack
from pipa_openrlhf.data.sources import as_row
from pipa_openrlhf.data.tokenise import tokenise
from pipa_openrlhf.errors import UserError


@dataclass(frozen=True)
class RowChunk:
    """Rows ``(source, where, row)`` that follow each other; ``first`` is the number of the first one, from 0."""

    first: int
    rows: list[tuple[int, str, str | dict]]


@dataclass
class Counts:
    """What rows hold.

    Attributes:
        ties: rows without an answer to learn from, such as a comparison that ends in a tie.
        without_prompt: records whose prompt is empty.
    """

    rows: int = 0
    records: int = 0
    ties: int = 0
    without_prompt: int = 0

    def add(self, other: "Counts") -> None:
        """Count the other's too."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class SampleChunk:
    """What becomes of a chunk of rows.

    Attributes:
        counts: see :class:`Counts`.
        packed: see ``samples.pack``.
        dropped: records that became no sample.
        label_sources: how many records were labelled by what, see ``data/record.py``.
        bad: rows that cannot be read.
    """

    counts: Counts
    packed: dict[str, Any]
    dropped: Dropped
    label_sources: Counter[str]
    bad: list[BadRow]


@dataclass(frozen=True)
class Reader:
    """Reads chunks of rows; goes to other processes as it is.

    Attributes:
        readings: one a source.
    """

    readings: tuple[Reading, ...]
    tokenizer: PreTrainedTokenizerBase
    flags: DataConfig

    def __call__(self, chunk: RowChunk) -> SampleChunk:
        """Samples of the rows, up to the first bad one where that ends the run.

        Their order and content do not depend on how rows were cut into chunks.

        Raises:
            UserError: a flag or the tokenizer cannot be used.
        """
        counts, records, bad = Counts(), [], []
        for index, (source, where, row) in enumerate(chunk.rows, start=chunk.first):
            counts.rows += 1
            try:
                found = self._records(source, where, row, index)
            except UserError as error:
                bad.append((where, str(error)))
                if self.flags.on_error == "fail":
                    break
                continue
            records += found
            counts.ties += not found
        counts.records = len(records)
        counts.without_prompt = sum(not record.prompt for record in records)
        samples, dropped = tokenise(
            records,
            self.tokenizer,
            max_len=self.flags.max_len,
            annotation=self.flags.annotation,
            step_separator=self.flags.step_separator,
        )
        return SampleChunk(counts, pack(samples), dropped, Counter(one.label_source for one in records), bad)

    def _records(self, source: int, where: str, row: str | dict, index: int) -> list[Record]:
        records = self.readings[source].records(as_row(where, row), where, index)
        if self.flags.annotation == "step":
            check_step_labels(records)
        return records


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
