"""Problem files: what is read, and the line that says what is wrong."""

import json

import pytest

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.problems import Problem, read_problems
from recipes.word_problems.label_steps import require_steps


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_reads_our_own_format_and_gsm8k(tmp_path):
    path = write(
        tmp_path / "problems.jsonl",
        {"question": "1 + 1?", "steps": ["1 + 1 = 2", "#### 2"], "answer": "2", "problem_id": "a"},
        {"question": "Natalia?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072", "extra": 1},
        "",
        {"prompt": "2 + 2?", "answer": 4},
    )
    assert read_problems(path) == [
        Problem("a", "1 + 1?", "2", ["1 + 1 = 2", "#### 2"]),
        Problem("2", "Natalia?", "1,072", None),
        Problem("3", "2 + 2?", "4", None),
    ]
    assert len(read_problems(path, most=2)) == 2


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{", ["line 2", "not valid JSON"]),
        ([1], ["line 2", "object"]),
        ({"answer": "2"}, ["line 2", "`question` or `prompt`", "answer"]),
        ({"question": " ", "answer": "2"}, ["line 2", "question"]),
        ({"question": ["x"], "answer": "2"}, ["line 2", "question"]),
        ({"question": "x"}, ["line 2", "`answer`"]),
        ({"question": "x", "answer": None}, ["line 2", "`answer`"]),
        ({"question": "x", "answer": "72 ####"}, ["line 2", "empty"]),
        ({"question": "x", "answer": "2", "steps": "1 + 1 = 2"}, ["line 2", "`steps`"]),
        ({"question": "x", "answer": "2", "problem_id": "one"}, ["line 2", "'one'", "before"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, words):
    path = write(tmp_path / "p.jsonl", {"question": "1?", "answer": "1", "problem_id": "one"}, bad)
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert all(word in str(error.value) for word in [path, *words])
    assert "\n" not in str(error.value)


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="empty"):
        read_problems(write(tmp_path / "empty.jsonl", ""))


def test_step_labels_need_worked_steps():
    with pytest.raises(UserError, match="problem 7.*`steps`"):
        require_steps([Problem("7", "q", "2", None)], "file")
    with pytest.raises(UserError, match="no right equation"):
        require_steps([Problem("7", "q", "2", ["two"])], "file")
    require_steps([Problem("7", "q", "2", ["1 + 1 = 2", "#### 2"])], "file")


@pytest.mark.parametrize("step", ["1. 1 + 1 = 2", "**1 + 1 = 2**", r"\(1 \times 1 = 1\)", "In 3 days: 1 × 2 = 2"])
def test_worked_steps_may_be_laid_out(step):
    require_steps([Problem("1", "q", "2", [step, "#### 2"])], "problems.jsonl")
