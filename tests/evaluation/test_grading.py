"""Finding and comparing final answers."""

from fractions import Fraction

import pytest

from pipa_openrlhf.evaluation.grading import extract_answer, is_right, is_same_answer, parse_number


@pytest.mark.parametrize(
    "text, answer",
    [
        ("3 * 4 = 12\n#### 12", "12"),
        ("#### 12\nQuestion: and then?\n#### 99", "12"),
        ("####12", "12"),
        ("#### $1,200.50", "$1,200.50"),
        (r"so \boxed{7}", "7"),
        (r"first \boxed{7}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"#### \boxed{7}", "7"),
        ("Final Answer: 3/4", "3/4"),
        ("final answer : 5\nFinal Answer: 6", "6"),
        (r"Final Answer: $\boxed{8}$", "8"),
        ("the answer is 12", None),
        ("#### ", None),
        ("####\n12", None),
        (r"\boxed{7", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, number",
    [
        ("72", 72),
        ("-5", -5),
        ("+5", 5),
        ("007", 7),
        ("1,234,567", 1234567),
        ("$18.00", 18),
        (r"\$18", 18),
        ("50%", 50),
        ("57.", 57),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6 / 8", Fraction(-3, 4)),
        ("$12$", 12),
        ("**12**", 12),
        ("1,23", None),
        ("1/0", None),
        ("12 apples", None),
        ("1.2.3", None),
        ("", None),
        ("-", None),
        ("/", None),
        ("x", None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "prediction, gold, same",
    [
        ("72.0", "72", True),
        ("0.75", "3/4", True),
        ("1,000", "1000", True),
        ("0.1", "1/10", True),
        ("72.1", "72", False),
        ("x = 2", "X  =  2", True),
        ("Monday.", "monday", True),
        ("12 apples", "12", False),
        ("1/99999999999999999998", "1/99999999999999999999", False),
    ],
)
def test_is_same_answer(prediction, gold, same):
    assert is_same_answer(prediction, gold) is same


def test_a_missing_marker_is_wrong():
    assert not is_right("3 * 4 = 12", "12")


def test_the_cut_off_line_of_an_unfinished_text_does_not_count():
    assert not is_right("#### 5", "5", finished=False)  # might have become 57
    assert is_right("#### 5\nQues", "5", finished=False)
    assert is_right("#### 5", "5")
