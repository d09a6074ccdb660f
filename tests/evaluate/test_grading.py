"""Finding and comparing final answers."""

import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.evaluate.grading import extract_answer, is_right, is_same_answer, parse_number


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
        ("<think>maybe #### 3, no</think>\n#### 4", "4"),
        ("maybe #### 3, no</think>\n#### 4", "4"),  # the prompt opened the block
        ("<think>a</think>#### 4\n<think>b #### 5</think>", "4"),
        ("<think>a <think>b</think> #### 5</think>#### 4", "4"),
        (r"<think>\boxed{3}</think>so \boxed{4}", "4"),
        ("<think>\nFinal Answer: 3\n</think>\nFinal Answer: 4", "4"),
        ("<think>#### 3", None),
        ("<think>#### 3</think>", None),
        (r"<think>\boxed{3}</think> who knows", None),
        ("#### 4\n<think>#### 5", "4"),
        ("**Final Answer:** 12", "** 12"),
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
        ("-$18.50", Fraction(-37, 2)),
        ("$ -5", -5),
        ("18$", 18),
        (r"50\%", 50),
        ("**$12.50**.", Fraction(25, 2)),
        ("** 12", 12),
        ("12**", 12),
        ("*12*", 12),
        ("−5", -5),
        ("0.00005", Fraction(1, 20000)),
        ("5e-05", Fraction(1, 20000)),
        ("1e21", 10**21),
        ("1E+21", 10**21),
        ("-2.5e-7", Fraction(-25, 10**8)),
        ("5*4", None),
        ("2**3", None),
        ("3$4", None),
        ("5%0", None),
        (r"3\$4", None),
        (r"5\%0", None),
        ("5 * 4", None),
        ("3$/4", None),
        ("1.2.", Fraction(6, 5)),
        ("5e", None),
        ("e5", None),
        ("1e999999999", None),
        ("1, 234", None),
        ("--5", None),
        ("5-", None),
        ("$", None),
        ("*", None),
        ("%", None),
        ("9" * 5000, None),
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
        ("5*4", "54", False),
        ("2**3", "23", False),
        ("3$4", "34", False),
        ("5%0", "50", False),
        ("5*4", "5*4", True),
        ("a*b", "ab", False),
        ("5e-05", "0.00005", True),
        ("0.00005", "5e-05", True),
        ("1e21", "1,000,000,000,000,000,000,000", True),
        ("1e21", "1e22", False),
        ("1e-7", "-1e7", False),
        ("(1,2)", "(1, 2)", True),
        ("( 1 , 2 )", "(1,2)", True),
        ("[1,  2]", "[1,2]", True),
        ("{a, b}", "{a,b}", True),
        ("(1,2)", "(1,3)", False),
        ("(1,2)", "(12)", False),
        ("1, 234", "1234", False),
        ("1, 2", "1,2", True),
        ("x y", "xy", False),
        ("**Monday**", "Monday", True),
        ("$x + 1$", "x + 1", True),
        ("", "", True),
        ("Yes", "72", False),
        ("72", "Yes", False),
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


def test_a_thought_that_is_cut_off_commits_to_nothing():
    assert not is_right("<think>so\n#### 5\nand", "5", finished=False)
    assert not is_right("<think>so\n#### 5", "5")


numbers = st.one_of(st.integers(-(10**25), 10**25), st.floats(allow_nan=False, allow_infinity=False))


@given(numbers)
def test_numbers_match_however_json_writes_them(number):
    written = json.dumps(number)
    assert parse_number(written) == Fraction(str(number))
    assert is_same_answer(f"{Decimal(written):f}", written)


@given(numbers, st.sampled_from(["**{}**", "*{}*", "${}$", "{}%", "{}.", "  {} ", r"{}\%", "**{}**.", "$ {} $"]))
def test_marks_around_a_number_do_not_change_it(number, decoration):
    assert parse_number(decoration.format(number)) == parse_number(str(number))


@given(st.integers(0, 999), st.sampled_from(["*", "**", "$", r"\$", "%", r"\%", " ", "^", "x"]), st.integers(0, 99))
def test_a_mark_between_digits_never_joins_them(left, mark, right):
    assert not is_same_answer(f"{left}{mark}{right}", f"{left}{right}")
