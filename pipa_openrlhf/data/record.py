"""What every layout yields: one prompt, one answer in steps, and their labels."""

from collections import Counter
from dataclasses import dataclass

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

    @property
    def label(self) -> int | None:
        """1 or 0 of what was written: of the whole answer, or else of the side of a comparison that it is."""
        return self.side if self.answer_label is None else self.answer_label


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
