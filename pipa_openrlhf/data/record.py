"""What every reader yields: one prompt, one answer in steps, and their labels."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One answer to one prompt, before tokenisation.

    Attributes:
        prompt: text, or chat messages ``[{"role": ..., "content": ...}]``.
        steps: texts of the steps in order; an answer without steps is one step.
        step_labels: 1 (right) or 0 (wrong) a step, or None where the data has none.
        answer_label: 1 (right, chosen) or 0 (wrong, rejected).
        problem_id: answers with the same one belong to the same problem.
        where: file and line, for messages.
        pair_id: the two sides of a pair share it; None for a single answer.
        masked_spans: ``(step, start, end)`` in characters of that step, text the model did not write.
        messages: the answer as chat messages, where the data gave it so without steps. None: the answer is ``steps``,
            which become one assistant message when the prompt is messages.
    """

    prompt: str | list[dict]
    steps: list[str]
    step_labels: list[int] | None
    answer_label: int
    problem_id: str
    where: str
    pair_id: int | None = None
    masked_spans: tuple[tuple[int, int, int], ...] = ()
    messages: list[dict] | None = None


class Dropped:
    """Records left out, counted by reason, with the place of the first of each kind."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self._first.setdefault(reason, where)

    def __str__(self) -> str:
        return "; ".join(
            f"{count} {reason} (first: {self._first[reason]})" for reason, count in self.counts.most_common()
        )
