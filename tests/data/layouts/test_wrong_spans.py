"""Solutions whose first wrong step is marked as a span, in rows and in one published object."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError

Q = "What is 1+1+1?"
ASKED = f"Solve it.\n\n{Q}\n\n1. Count."
# The span is the second sentence of the second paragraph.
TEXT = "Let us count.\n\n1+1=2. So 2+1=4. Good.\n\nIt is 4."
START, END = TEXT.index("So"), TEXT.index(" Good")
STEPS = ["Let us count.", "1+1=2.", "So 2+1=4.", "Good.", "It is 4."]
SOLVED = "1+1=2.\n2+1=3.\n \nIt is 3."


def said(text: str) -> dict:
    texts = [("System", "You count."), ("User", ASKED), ("Model.M", text), ("User", "Summarize."), ("Model.M", "3")]
    return {"messages": [{"role": role, "text": text, "error": None} for role, text in texts]}


def mark(text: str, start: int | None = None, end: int | None = None) -> dict:
    return {"text": text, "start_idx": start, "end_idx": end, "author": "M"}


PROBLEM = {
    "identifier": "P_1",
    "_raw_text": Q,
    "_text": Q,
    "fws_annotations": {"M|0-Shot": mark(TEXT, START, END), "M|w/ H": mark(SOLVED)},
    "conversations": {"M|0-Shot": said(TEXT), "M|w/ H": said(SOLVED), "M|other": said("2")},
}


def test_paragraphs_and_the_span(read_records):
    name, records = read_records([PROBLEM])
    assert name == "wrong_spans"
    assert [(one.steps, one.step_labels, one.answer_label, one.complete) for one in records] == [
        (STEPS, [1, 1, 0, 0, 0], None, True),
        (["1+1=2.\n2+1=3.", "It is 3."], [1, 1], 1, True),
    ]
    assert {(one.problem_id, one.prompt) for one in records} == {("P_1", f"You count.\n\n{ASKED}")}


def test_steps_after_the_error_may_be_masked(read_records):
    _, [record, _] = read_records([PROBLEM], after_first_error="mask")
    assert record.step_labels == [1, 1, 0, None, None]


def test_the_conversation_before_the_solution_is_the_prompt(read_records):
    _, [record, _] = read_records([PROBLEM], apply_chat_template=True)
    assert record.prompt == [{"role": "system", "content": "You count."}, {"role": "user", "content": ASKED}]
    assert record.messages is None and record.steps == STEPS


def test_without_conversations_the_problem_is_the_prompt(read_records):
    row = {key: value for key, value in PROBLEM.items() if key != "conversations"}
    assert [one.prompt for one in read_records([row])[1]] == [Q, Q]
    chat = read_records([row], apply_chat_template=True)[1]
    assert chat[0].prompt == [{"role": "user", "content": Q}]


def test_one_object_of_problems_is_a_file(read_records, tmp_path):
    second = {**PROBLEM, "identifier": "P_2", "fws_annotations": {"M|w/ H": mark(SOLVED)}}
    path = tmp_path / "v0.json"
    path.write_text(json.dumps({"problems": {"P_1": PROBLEM, "P_2": second}, "concepts": {}, "hints": {}}, indent=2))
    [(where, row)] = read_json_rows(str(path))
    assert where == f"{path} line 1"
    name, records = read_records([row])
    assert name == "wrong_spans"
    assert [one.problem_id for one in records] == ["P_1", "P_1", "P_2"]


@pytest.mark.parametrize(
    "annotation, problem",
    [
        (mark(TEXT, 5, 500), "'start_idx' and 'end_idx' are 5 and 500 in a text of 47 characters; correct them"),
        (mark(TEXT, 5, None), "'start_idx' and 'end_idx' are 5 and null in a text of"),
        (mark(TEXT, 5, 5), "'start_idx' and 'end_idx' are 5 and 5 in a text of"),
        (mark(""), "'text' is empty"),
    ],
)
def test_bad_marks(read_records, annotation, problem):
    row = copy.deepcopy(PROBLEM)
    row["fws_annotations"]["M|0-Shot"] = annotation
    with pytest.raises(UserError, match=f"^data.jsonl line 1: P_1 'M|0-Shot': {problem}".replace("|", "\\|")):
        read_records([row])


def test_the_published_file(read_records):
    found = importlib.util.find_spec("champ_dataset")
    if found is None or found.origin is None:
        pytest.skip("champ-dataset is not installed")
    [(_, row)] = read_json_rows(str(Path(found.origin).parent / "dataset_files" / "v0.json"))
    name, records = read_records([row])
    marks = [mark for problem in row["problems"].values() for mark in problem["fws_annotations"].values()]
    assert (name, len(records)) == ("wrong_spans", len(marks))
    for record, given in zip(records, marks, strict=True):
        wrong = None if given["start_idx"] is None else given["text"][given["start_idx"] : given["end_idx"]].strip()
        first = record.step_labels.index(0) if 0 in record.step_labels else None
        assert wrong == (None if first is None else record.steps[first])
        assert "".join("".join(record.steps).split()) == "".join(given["text"].split())
