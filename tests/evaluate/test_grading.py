"""Finding and comparing final answers."""

import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.evaluate.grading import (
    as_mathematics,
    committed_answer,
    compare_plainly,
    extract_answer,
    last_boxed,
    parse_number,
)


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


def test_an_unfinished_text_commits_to_nothing_on_its_cut_off_line():
    assert committed_answer("#### 5", finished=False) is None  # might have become 57
    assert committed_answer("#### 5\nQues", finished=False) == "5"
    assert committed_answer("#### 5") == "5"
    assert committed_answer("<think>so\n#### 5\nand", finished=False) is None


@pytest.mark.parametrize(
    "text, box",
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed 7.", "7."),
        (r"\fbox{8}", "8"),
        (r"\boxed {9}", "9"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{x\right\}}", r"\left\{x\right\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{7", None),
        (r"\boxed", None),
        ("7", None),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    "prediction, gold, same",
    [
        ("72.0", "72", True),
        ("0.75", "3/4", True),
        ("1,000", "1000", True),
        ("0.1", "1/10", True),
        ("72.1", "72", False),
        ("1/99999999999999999998", "1/99999999999999999999", False),
        ("5e-05", "0.00005", True),
        ("1e21", "1,000,000,000,000,000,000,000", True),
        ("1e21", "1e22", False),
        ("1e-7", "-1e7", False),
        ("x = 2", "X  =  2", True),
        ("Monday.", "monday", True),
        ("**Monday**", "Monday", True),
        ("", "", True),
        ("5}{6", "5", False),  # would be read as 5
        ("6}", "6 + 1", False),
        ("{6", "6 + 1", False),
        (r"\{6", "6 + 1", None),
        ("Yes", "72", None),
        (r"\frac{1}{2}", "0.5", None),
        ("(1,2)", "(1, 2)", None),
    ],
)
def test_compare_plainly(prediction, gold, same):
    assert compare_plainly(prediction, gold) is same


@pytest.mark.parametrize(
    "answer, formula",
    [
        ("$x + 1$", r"$\boxed{x + 1}$"),
        (r"\(x\).", r"$\boxed{x}$"),
        ("** 12", r"$\boxed{12}$"),
        (r"\$5", r"$\boxed{5}$"),
        ("$x=2$ or $x=3$", r"$\boxed{x=2  or  x=3}$"),
        ("3$4", r"$\boxed{3 4}$"),
        (r"50\%", r"$\boxed{50\%}$"),
        ("(1,2)", r"$\boxed{(1,2)}$"),
    ],
)
def test_as_mathematics(answer, formula):
    assert as_mathematics(answer) == formula


numbers = st.one_of(st.integers(-(10**25), 10**25), st.floats(allow_nan=False, allow_infinity=False))


@given(numbers)
def test_numbers_match_however_json_writes_them(number):
    written = json.dumps(number)
    assert parse_number(written) == Fraction(str(number))
    assert compare_plainly(f"{Decimal(written):f}", written)


@given(numbers, st.sampled_from(["**{}**", "*{}*", "${}$", "{}%", "{}.", "  {} ", r"{}\%", "**{}**.", "$ {} $"]))
def test_marks_around_a_number_do_not_change_it(number, decoration):
    assert parse_number(decoration.format(number)) == parse_number(str(number))
