"""Solutions of models in which the first wrong step is marked as a span of the text: CHAMP, a problem or the file."""

import re
from collections.abc import Iterator

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import labelled_record, until_error
from pipa_openrlhf.data.record import Record

COLUMNS = ("problems or _text", "fws_annotations")
READING = (
    "a record for each of CHAMP's annotated solutions, of its published file (one object, `problems`) or of a problem "
    "a row; steps are the paragraphs and, cut out of them, the span marked as the first wrong step; the steps after "
    "it by `--data.after_first_error`; no mark is a right answer; the prompt is what the model was asked, hints too"
)
SPAN = {"text": "1+1=2. So 2+1=4.\n\nIt is 4.", "start_idx": 7, "end_idx": 16, "author": "M"}
EXAMPLE = {"identifier": "P_1", "_text": "1+1+1=", "fws_annotations": {"M|0-Shot": SPAN}}
ROLES = {"System": "system", "User": "user"}


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row is a problem with annotations, or an object of such problems."""
    return any("fws_annotations" in problem for _, problem in _problems(row))


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Records of every annotation, in the order of the data."""
    return [
        _record(problem, key, annotation, f"{where}: {name} {key!r}", flags)
        for name, problem in _problems(row)
        for key, annotation in (problem.get("fws_annotations") or {}).items()
    ]


def _problems(row: dict) -> Iterator[tuple[str, dict]]:
    problems = row.get("problems")
    if isinstance(problems, dict):
        yield from problems.items()
    else:
        yield str(row.get("identifier")), row


def _record(problem: dict, key: str, annotation: dict, where: str, flags: DataConfig) -> Record:
    text = fields.text(annotation.get("text"), "text", where)
    start, end = annotation.get("start_idx"), annotation.get("end_idx")
    if start is None and end is None:
        steps, first = _paragraphs(text), None
    else:
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            span = f"'start_idx' and 'end_idx' are {fields.show(start)} and {fields.show(end)}"
            fields.refuse(where, f"{span} in a text of {len(text)} characters", "correct them or remove the row")
        before = _paragraphs(text[:start])
        steps, first = [*before, text[start:end], *_paragraphs(text[end:])], len(before)
    labels = until_error(len(steps), first, "start_idx", where, flags)
    row = {"problem_id": problem.get("identifier"), **problem}
    right = 1 if first is None else None  # a wrong step may be followed by a right answer
    prompt = _prompt(problem, key, text, where, flags)
    return labelled_record(row, where, flags, steps, labels, name="text", answer_label=right, prompt=prompt)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _prompt(problem: dict, key: str, text: str, where: str, flags: DataConfig) -> str | list[dict]:
    """What was said before the solution; the problem alone where the conversation is not given."""
    said = ((problem.get("conversations") or {}).get(key) or {}).get("messages") or []
    end = next((number for number, message in enumerate(said) if message["text"] == text), 0)
    asked = [
        {"role": ROLES.get(message["role"], "assistant"), "content": fields.text(message["text"], "messages", where)}
        for message in said[:end]
    ] or [{"role": "user", "content": fields.text(problem.get("_text"), "_text", where)}]
    return asked if flags.apply_chat_template else "\n\n".join(message["content"] for message in asked)
