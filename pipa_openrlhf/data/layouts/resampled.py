"""Answers sampled anew from the middle of a solution: the math-rollouts of "Thought Anchors", files or table."""

import json
from collections.abc import Iterator

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import join, make_record, to_answer
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.errors import first_line

COLUMNS = ("full_cot", "rollout or solution", "is_correct")
READING = (
    "a record for each `rollout`, or `solution`, of `solutions.json` or `base_solution.json`, or of a row that holds "
    "such a file as `content`; the thoughts before it belong to the prompt; one whose `answer` is empty does not end; "
    "other files yield nothing"
)
EXAMPLE = {"rollout": " \\boxed{2}", "full_cot": "1+1=<think>\nIt is \\boxed{2}", "answer": "2", "is_correct": True}
TEXTS = ("rollout", "solution")
FILES = ("solutions.json", "base_solution.json")
THOUGHTS = "<think>"


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row is an answer with its whole text, or a file of such answers."""
    if "content" in row and "path" in row:
        return _is_answers(row)
    return "full_cot" in row and "is_correct" in row and any(name in row for name in TEXTS)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Records of the answers; none of those that failed to be sampled."""
    found = _answers(row, where)
    return [_record(one, place, where, flags) for place, one in found if one.get("error") is None]


def _answers(row: dict, where: str) -> Iterator[tuple[str, dict]]:
    if "content" not in row:
        yield "", row
    elif _is_answers(row):
        try:
            content = json.loads(fields.text(row["content"], "content", where))
        except ValueError as error:
            fields.refuse(where, f"'content' is not valid JSON ({first_line(error)})", "correct or remove the row")
        several = content if isinstance(content, list) else [content]
        yield from ((f"content[{number}].", one) for number, one in enumerate(several))


def _is_answers(row: dict) -> bool:
    return str(row.get("path")).rsplit("/", 1)[-1] in FILES


def _record(one: dict, place: str, where: str, flags: DataConfig) -> Record:
    name = next((name for name in TEXTS if one.get(name) is not None), TEXTS[0])
    text = fields.text(one.get(name), place + name, where)
    whole = fields.text(one.get("full_cot"), f"{place}full_cot", where)
    if not whole.endswith(text) or whole == text:
        fields.refuse(where, f"'{place}full_cot' does not end with {name!r}", "correct it or remove the row")
    prompt, mark, thoughts = whole[: -len(text)].partition(THOUGHTS)
    answer = to_answer(text, place + name, where)
    conversation = join(prompt, answer, flags, where, prefix=mark + thoughts)
    label = fields.label(one.get("is_correct"), f"{place}is_correct", where)
    complete = one.get("answer") != ""
    return make_record(one, where, conversation, step_labels=None, answer_label=label, complete=complete)
