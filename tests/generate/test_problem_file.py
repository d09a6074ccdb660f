"""Problem files: what is read, and the line that says what is wrong."""

import json

import pyarrow
import pyarrow.parquet
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
        ({"answer": "2"}, ["line 2", "`question`, `prompt` or `problem`", "answer"]),
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


MATH = {
    "problem": "Half?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": r"It is \boxed{1}. No, $\boxed{\frac{1}{2}}$.",
}


def test_reads_the_layouts_of_math(tmp_path):
    path = write(
        tmp_path / "math.jsonl",
        MATH,
        {"problem": "Half?", "answer": "\\frac12", "solution": r"\boxed{7}", "level": 5, "subject": "Geometry"},
        {"problem": "One?", "answer": r"$\boxed{1}$", "problem_id": None},
    )
    assert read_problems(path) == [
        Problem("1", "Half?", r"\frac{1}{2}", None, "Level 3", "Algebra"),
        Problem("2", "Half?", "\\frac12", None, "5", "Geometry"),
        Problem("3", "One?", "1", None),
    ]


def test_reads_parquet(tmp_path):
    path = str(tmp_path / "math.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([MATH, {**MATH, "level": None}, MATH]), path)
    expected = Problem("1", "Half?", r"\frac{1}{2}", None, "Level 3", "Algebra")
    assert read_problems(path, most=2) == [expected, Problem("2", "Half?", r"\frac{1}{2}", None, None, "Algebra")]


def test_reads_the_wanted_split_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "1?", "answer": "1"})
    write(tmp_path / "test.jsonl", {"question": "2?", "answer": "2"})
    assert [one.answer for one in read_problems(str(tmp_path))] == ["2"]
    assert [one.answer for one in read_problems(str(tmp_path), split="train")] == ["1"]
    with pytest.raises(UserError, match="no split 'dev', it has .*; choose one by --problems.split$"):
        read_problems(str(tmp_path), split="dev")


def test_data_that_are_not_there(tmp_path):
    for path in (str(tmp_path / "none.parquet"), "./none", "none.jsonl"):
        with pytest.raises(UserError, match=f"--problems.file {path}: no such file"):
            read_problems(path)
    with pytest.raises(UserError, match="^nobody/nothing: "):
        read_problems("nobody/nothing")
    with pytest.raises(UserError, match=r"line 1: `solution` has no answer in \\boxed\{\}"):
        read_problems(write(tmp_path / "p.jsonl", {"problem": "?", "solution": "7"}))
