"""Labelling the steps of an answer by rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import read_jsonl, write_jsonl

from pipa_openrlhf.annotate.answers import split_steps
from pipa_openrlhf.cli.entry import run
from recipes.word_problems import label_steps as label_steps_script
from recipes.word_problems.label_steps import LabelConfig
from recipes.word_problems.steps import label_steps, label_words, split_words

GOLD = ["12 + 7 = 19", "19 * 3 = 57", "#### 57"]


@pytest.mark.parametrize(
    "steps, right, labels",
    [
        (GOLD, True, [1, 1, 1]),
        (["7 + 12 = 19", "3 * 19 = 57", "#### 57"], True, [1, 1, 1]),
        # right by another way: all steps of a right answer are right
        (["12 * 3 = 36", "7 * 3 = 21", "36 + 21 = 57", "#### 57"], True, [1, 1, 1, 1]),
        # arithmetic slip, then everything after it is wrong although its own equation holds
        (["12 + 7 = 18", "18 * 3 = 54", "#### 54"], False, [0, 0, 0]),
        (["12 + 7 = 19", "19 * 3 = 47", "#### 47"], False, [1, 0, 0]),
        # right equation, wrong plan
        (["12 * 7 = 84", "#### 84"], False, [0, 0]),
        # the value returns to the gold one after a wrong step
        (["12 + 7 = 20", "19 * 3 = 57", "#### 58"], False, [0, 0, 0]),
        # all equations right, the answer copied wrongly
        (["12 + 7 = 19", "19 * 3 = 57", "#### 75"], False, [1, 1, 0]),
        # stops early: the last step is the answer's
        (["12 + 7 = 19"], False, [0]),
        (["12 + 7 = 19", "19 * 3 = 57", "57 + 0 = 57", "57 + 1 = 58", "#### 58"], False, [1, 1, 0, 0, 0]),
        (["Let us think.", "12 + 7 = 19", "#### 19"], False, [0, 0, 0]),
    ],
)
def test_label_steps(steps, right, labels):
    assert label_steps(steps, GOLD, right) == [bool(label) for label in labels]


def test_a_right_result_is_checked_where_asked_for(tmp_path, capsys):
    """Ten forgotten when adding and when subtracting: the result is right, two of its steps are not."""
    problem = {"problem_id": "a", "question": "26+9-6", "answer": "29", "steps": ["26+9=35", "35-6=29", "#### 29"]}
    lucky, right = ["26+9=25", "25-6=29", "#### 29"], ["26+9=35", "35-6=29", "#### 29"]
    rows = [
        {"problem_id": "a", "prompt": "26+9-6", "completion": "\n".join(one), "label": True} for one in (lucky, right)
    ]
    words = ["--answers", write_jsonl(tmp_path / "sampled.jsonl", rows)]
    words += ["--problems", write_jsonl(tmp_path / "problems.jsonl", [problem])]
    found = []
    for more in ([], ["--check_right"]):
        output = str(tmp_path / "steps.jsonl")
        assert run(label_steps_script.main, LabelConfig, [*words, "--output", output, *more]) == 0
        found.append([row["labels"] for row in read_jsonl(output)])
    assert found == [[[True] * 3, [True] * 3], [[False] * 3, [True] * 3]]
    words += ["--output", str(tmp_path / "words.jsonl"), "--check_right", "--by", "word"]
    assert run(label_steps_script.main, LabelConfig, words) == 1
    assert "--check_right is about lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout", ["1. {}", "- {}", "Step 2: {}", "**{}**", r"\({}\)", "In 3 days: {}", "So 2 boxes, {}"]
)
def test_layout_of_steps_and_of_worked_steps_changes_no_label(layout):
    answer = ["12 + 7 = 19", r"19 \times 3 = 47", "#### 47"]
    laid_out = [layout.format(step) for step in answer]
    for gold in (GOLD, [layout.format(step) for step in GOLD]):
        assert label_steps(laid_out, gold, False) == label_steps(answer, gold, False) == [True, False, False]


@given(st.text(alphabet="ab \n", max_size=12))
def test_split_steps_loses_nothing_and_leaves_no_step_empty(text):
    steps = split_steps(text)
    assert "\n".join(steps) == text
    assert text == "" or all(steps)


def test_split_steps_is_one_step_a_line():
    assert split_steps("12 + 7 = 19\n\n19 * 3 = 57\n#### 57") == ["12 + 7 = 19\n", "19 * 3 = 57", "#### 57"]


@pytest.mark.parametrize(
    "answer, right, labels",
    [
        ("12 + 7 = 19\n19 * 3 = 57\n#### 57", True, "1111111111 11"),
        ("12 + 7 = 19\n19 * 3 = 47\n#### 47", False, "111111111- 00"),
        # the wrong operation; what follows from it has no label
        ("12 - 7 = 5\n5 * 3 = 15\n#### 15", False, "1-00000000 00"),
        # a sum and a product the other way round
        ("7 + 12 = 19\n3 * 19 = 57\n#### 75", False, "1111111111 1-"),
        ("7 + 7 = 14", False, "11-00"),
        # stops early, goes on, is another text, is empty
        ("12 + 7 = 19", False, "1111-"),
        ("12 + 7 = 19\n19 * 3 = 57\n#### 57\n#### 58", False, "1111111111 11 -0"),
        ("Let us see", False, "-00"),
        ("", False, "-"),
    ],
)
def test_label_words(answer, right, labels):
    expected = [{"1": True, "-": False, "0": None}[one] for one in labels.replace(" ", "")]
    assert label_words(split_words(answer), GOLD, right) == expected


@given(st.text(alphabet="ab \n\t", max_size=12))
def test_split_words_loses_nothing_and_leaves_no_word_empty(text):
    words = split_words(text)
    assert "".join(words) == text
    assert not text.strip() or all(word.strip() and len(word.split()) == 1 for word in words)
