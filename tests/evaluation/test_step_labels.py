"""Labelling the steps of an answer by rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.evaluation.step_labels import equation_value, label_steps, split_steps

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


@pytest.mark.parametrize(
    "step, value",
    [
        ("12 + 7 = 19", 19),
        ("Tom has 12 + 7 = 19 apples.", 19),
        ("48/2 = <<48/2=24>>24", 24),
        ("5 * (2 + 1) = $15", 15),
        ("1,000 - 1 = 999", 999),
        ("0.1 + 0.2 = 0.3", 0.3),
        ("3 - 8 = -5", -5),
        ("12 + 7 = 20", None),
        ("2 ** 9 = 512", None),
        ("1 / 0 = 0", None),
        ("12 + = 12", None),
        ("(" * 5000 + "= 1", None),
        ("no equation", None),
        ("#### 57", None),
    ],
)
def test_equation_value(step, value):
    found = equation_value(step)
    assert found is None if value is None else float(found) == value


@given(st.text(alphabet="ab \n", max_size=12))
def test_split_steps_loses_nothing_and_leaves_no_step_empty(text):
    steps = split_steps(text)
    assert "\n".join(steps) == text
    assert text == "" or all(steps)


def test_split_steps_is_one_step_a_line():
    assert split_steps("12 + 7 = 19\n\n19 * 3 = 57\n#### 57") == ["12 + 7 = 19\n", "19 * 3 = 57", "#### 57"]
