"""Answers whose steps are to be labelled, as they are read, and with their labels, as they are written.

An annotator says which step of an answer is the first wrong one, or gives every step a value. The labels follow from
that and from the answer's own label as in the paper: all steps of a right answer are right, and the last step of an
answer has the answer's label.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.problems import question_of, read_rows

NO_ERROR = -1
_ANSWER_KEYS = ("completion", "completions", "response", "steps", "solution", "output", "answer")
_LABEL_KEYS = ("label", "answer_label", "is_correct", "correct")
_GOLD_KEYS = ("answer", "gold", "ground_truth", "target", "reference")
_STEP_TAG = "</step>"


@dataclass(frozen=True)
class SampledAnswer:
    """An answer to a problem, in steps.

    Attributes:
        problem_id, sample: which it is; no other answer of its file has both.
        steps: at least one, none empty; joined by line ends they are the answer.
        is_right: None where the file does not say it.
        gold: the problem's right answer; None where the file has none.
        where: file and line.
    """

    problem_id: str
    sample: int
    question: str
    steps: list[str]
    is_right: bool | None
    gold: str | None
    where: str

    @property
    def key(self) -> tuple[str, int]:
        """Tells it from the others of its file."""
        return self.problem_id, self.sample


@dataclass(frozen=True)
class Verdict:
    """What an annotator says of an answer.

    Attributes:
        first_error: index of the first wrong step, :data:`NO_ERROR` where none is.
        q_values: of each step, from -1 to 1; None: the annotator only says what is wrong.
    """

    first_error: int
    q_values: list[float] | None = None


def read_answers(path: str, flag: str) -> list[SampledAnswer]:
    """The answers of a file that ``sample`` wrote, or of rows with a question and an answer.

    Columns: ``prompt``, ``question`` or ``problem``; ``completion``, ``response``, ``solution`` or ``output`` (text, a
    step a line or a ``<step>``), or a list of texts, one a step, also as ``steps`` or ``completions``; where there is
    none of these, ``answer``. Optional: ``label`` or ``is_correct``; the right answer as ``answer``, ``gold`` or
    ``ground_truth``; ``problem_id`` (default: the question) and ``sample`` (default: counted).

    Raises:
        UserError: there is no such file, it has no rows, a row that cannot be read, or the same answer twice.
    """
    answers: dict[tuple[str, int], SampledAnswer] = {}
    counts: Counter[str] = Counter()
    for where, row in read_rows(path, None, flag=flag):
        answer = _read(row, where, counts)
        if answer.key in answers:
            raise UserError(
                f"{where}: problem_id {answer.problem_id!r} with sample {answer.sample} is also in "
                f"{answers[answer.key].where}; number the samples of a problem, or remove one"
            )
        answers[answer.key] = answer
    if not answers:
        raise UserError(f"{flag} {path}: it has no rows; add some")
    return list(answers.values())


def _read(row: dict, where: str, counts: Counter[str]) -> SampledAnswer:
    question = question_of(row, where)
    name = next((one for one in _ANSWER_KEYS if row.get(one) is not None), None)
    if name is None:
        raise UserError(
            f"{where}: needs the answer in `completion`, `response`, `solution` or `steps`; it has "
            f"{fields.column_names(row)}"
        )
    label = next((one for one in _LABEL_KEYS if row.get(one) is not None), None)
    gold = next((row[one] for one in _GOLD_KEYS if one != name and row.get(one) is not None), None)
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float)):
        raise UserError(f"{where}: the right answer is {fields.show(gold)}; give a text or a number")
    problem_id = question if row.get("problem_id") is None else str(row["problem_id"])
    sample = row.get("sample")
    if sample is None:
        sample = counts[problem_id]
        counts[problem_id] += 1
    if isinstance(sample, bool) or not isinstance(sample, int):
        raise UserError(f"{where}: `sample` is {fields.show(sample)}; give a whole number, or leave it out")
    return SampledAnswer(
        problem_id,
        sample,
        question,
        _steps(row[name], name, where),
        None if label is None else bool(fields.label(row[label], label, where)),
        None if gold is None else str(gold),
        where,
    )


def _steps(value: Any, name: str, where: str) -> list[str]:
    if isinstance(value, str):
        value = split_steps(value)
    if not isinstance(value, list):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give a text, or a list of texts, one a step")
    return fields.steps(value, name, where)


def split_steps(text: str) -> list[str]:
    """Lines of an answer, or its ``<step>...</step>`` blocks; joined by line ends they are the answer again.

    A blank line stays with the line before it (at the start: the one after it), so that no step is empty.
    """
    steps: list[str] = []
    for part in re.split(rf"(?<={_STEP_TAG})\n", text) if _STEP_TAG in text else text.split("\n"):
        if steps and (not part or not steps[-1].strip("\n")):
            steps[-1] += "\n" + part
        else:
            steps.append(part)
    return steps


def labels_of(answer: SampledAnswer, verdict: Verdict, threshold: float) -> list[bool]:
    """A label a step: all right in a right answer; in a wrong one by value and ``threshold``, or right up to the first
    wrong step; where the answer's own label is known the last step has it."""
    if answer.is_right:
        return [True] * len(answer.steps)
    if verdict.q_values is not None:
        labels = [q >= threshold for q in verdict.q_values]
    else:
        right = len(answer.steps) if verdict.first_error == NO_ERROR else verdict.first_error
        labels = [index < right for index in range(len(answer.steps))]
    return labels if answer.is_right is None else [*labels[:-1], False]


def to_row(answer: SampledAnswer, verdict: Verdict, method: str, format: str, threshold: float) -> dict:
    """A row that training reads: ``stepwise``, or AlphaMath's with a Q for each step."""
    labels = labels_of(answer, verdict, threshold)
    row: dict[str, Any] = {"problem_id": answer.problem_id, "sample": answer.sample}
    more = {"first_error": verdict.first_error, "annotator": method}
    if format == "alphamath":
        q_values = verdict.q_values or [1.0 if label else -1.0 for label in labels]
        q_values = [*q_values[:-1], 1.0 if labels[-1] else -1.0]
        path = [{"step": step, "Q": q} for step, q in zip(answer.steps, q_values)]
        return row | {"instruction": f"<question> {answer.question} </question>", "output": path} | more
    row |= {"prompt": answer.question, "completions": answer.steps, "labels": labels}
    if verdict.q_values is not None:
        row["q_values"] = verdict.q_values
    return row | {"answer_label": labels[-1]} | more
