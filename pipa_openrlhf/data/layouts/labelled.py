"""What the layouts of step-labelled answers share."""

import re
from collections.abc import Iterable
from dataclasses import replace

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt
from pipa_openrlhf.data.record import FROM_COLUMN, FROM_STEPS, Record

# Where the answer begins in data that write question and first step as one text.
_FIRST_STEP = re.compile(r"(?<!\S)Step 1\b")
# PRM800K's mark of a final answer; a row of it that does not end in one is a beginning.
PRM800K_ANSWER = re.compile(r"^# Answer\b", re.MULTILINE)
# How answers end: PRM800K's mark, MATH's, GSM8K's, Math-Shepherd's.
ENDED = re.compile(r"^# Answer\b|\\boxed\b|^####|\banswer is:", re.MULTILINE)


def labelled_record(
    row: dict,
    where: str,
    flags: DataConfig,
    steps: Iterable[object],
    step_labels: list[int | None] | None,
    *,
    name: str,
    answer_label: int | None,
    given: bool = False,
    complete: bool = True,
    prompt: str | list[dict] | None = None,
) -> Record:
    """A record of one answer in steps.

    Args:
        name: of the column that the steps come from.
        given: the data say themselves whether the answer is right; else it follows from the steps.
        prompt: None: the row's.
    """
    answer = Answer(name, step_texts(steps, name, where))
    conversation = join(needed_prompt(row, answer, flags, where) if prompt is None else prompt, answer, flags, where)
    labels = {"step_labels": step_labels, "answer_label": answer_label, "complete": complete}
    return make_record(row, where, conversation, label_source=FROM_COLUMN if given else FROM_STEPS, **labels)


def decide_prefixes(last_steps: Iterable[object], flags: DataConfig) -> DataConfig:
    """``--data.prefixes`` of data in which one answer ends as PRM800K's do: the others do not end, then."""
    if flags.prefixes != "auto":
        return flags
    marked = any(isinstance(step, str) and PRM800K_ANSWER.search(step) for step in last_steps)
    return replace(flags, prefixes="true" if marked else "false")


def is_complete(last_step: object, flags: DataConfig) -> bool:
    """Whether the answer ends with this step."""
    return flags.prefixes != "true" or ENDED.search(str(last_step)) is not None


def step_texts(steps: Iterable[object], name: str, where: str) -> list[str]:
    """The texts without the space around them, none of them empty."""
    return fields.steps([step.strip() if isinstance(step, str) else step for step in steps], name, where)


def split_question(text: str, name: str, where: str) -> tuple[str, str]:
    """Question and answer of one text: the answer begins with "Step 1"."""
    found = _FIRST_STEP.search(text)
    if not found or not text[: found.start()].strip():
        problem = f'{name!r} does not say by "Step 1", after the question, where the answer begins'
        fields.refuse(where, problem, "write the question into a column of its own and name it by --data.prompt_key")
    return text[: found.start()].strip(), text[found.start() :].strip()


def until_error(count: int, first: int | None, name: str, where: str, flags: DataConfig) -> list[int | None]:
    """Labels of ``count`` steps, the ``first``-th (from 0) of which is the first wrong one; None: all are right."""
    if first is None:
        return [1] * count
    if not 0 <= first < count:
        fields.refuse(where, f"{name!r} names step {first + 1} of {count}", "correct it or remove the row")
    after = 0 if flags.after_first_error == "negative" else None
    return [1] * first + [0] + [after] * (count - first - 1)
