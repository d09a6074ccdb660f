"""The equation that a step states, however it is laid out, and what is not taken for one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.annotate.equations import equation_value, equations_hold

PLAIN = [
    ("12 + 7 = 19", 19),
    ("48/2 = <<48/2=24>>24", 24),
    ("5 * (2 + 1) = $15", 15),
    ("1,000 - 1 = 999", 999),
    ("1,234,567 + 1 = 1,234,568", 1234568),
    ("0.1 + 0.2 = 0.3", 0.3),
    (".5 + .5 = 1", 1),
    ("007 + 1 = 8", 8),
    ("3 - 8 = -5", -5),
    ("-3 + 5 = 2", 2),
    ("2 * -3 = -6", -6),
    ("10 / 4 = 2.5", 2.5),
    ("2*6 = 3*4 = 12", 12),
    ("12 = 3 * 4", 12),
    ("5 = 5", 5),
    ("x = 3 * 4 = 12", 12),
    ("3 + 4 = 8, so 3 * 4 = 12", 12),  # the last equation is the step's
    ("100 / 2 = 50%", 50),
    ("$3 * 4 = $12", 12),
    ("$3 * 4$ = $12$", 12),
    ("-$5 + $8 = $3", 3),
    (r"\$3 * 4 = \$12", 12),
]
# @ stands for the value, 12
LAID_OUT = [
    "Tom has 3 * 4 = @ apples.",
    "1. 3 * 4 = @",
    "1) 3 * 4 = @",
    "(1) 3 * 4 = @",
    "12. 3 * 4 = @.",
    "- 3 * 4 = @",
    "* 3 * 4 = @",
    "+ 3 * 4 = @",
    "• 3 * 4 = @",
    "  - 1. 3 * 4 = @",
    "> 3 * 4 = @",
    "### 3 * 4 = @",
    "Step 2: 3 * 4 = @",
    "Step 2:3*4=@",
    "step 2.1) 3 * 4 = @",
    "Step 2 - 3 * 4 = @",
    "Step 2 – 3 * 4 = @",
    "Step 2. 3 * 4 = @",
    "### Step 2: 3 * 4 = @",
    "**3 * 4 = @**",
    "**3 * 4** = @",
    "3 * 4 = **@**",
    "3 * 4 = **@** apples",
    "**Step 2:** 3 * 4 = @",
    "**Step 2: 3 * 4 = @**",
    "- **Total**: 3 * 4 = @",
    "1. **3 * 4 = @**",
    "__3 * 4 = @__",
    "*3 * 4 = @*",
    "*3*4=@*",
    "_3 * 4 = @_",
    "`3 * 4 = @`",
    "`3 * 4` = `@`",
    r"\(3 * 4 = @\)",
    r"\( 3 * 4 \) = @",
    r"\[ 3 * 4 = @ \]",
    r"So \(3 \times 4 = @\).",
    r"3 \cdot 4 = @",
    r"$3 \times 4 = @$",
    r"24 \div 2 = @",
    "3 × 4 = @",
    "3×4=@",
    "3 · 4 = @",
    "3 ⋅ 4 = @",
    "24 ÷ 2 = @",
    "15 − 3 = @",
    "15 – 3 = @",
    "−3 + 15 = @",
    "3 x 4 = @",
    "3x4=@",
    "In 3 days: 3 * 4 = @",
    "In 3 days 3 * 4 = @",
    "In 3 days, 3 * 4 = @",
    "In 2020, 3 * 4 = @",
    "Day 3. 3 * 4 = @",
    "Day 3: 3 * 4 = @ apples",
    "So Tom has 2 boxes, 2*6=@",
    "So Tom has 2, 2*6=@",
    "He sold 5 (3 * 4 = @)",
    "First, a) 3 * 4 = @",
    "3 * 4 = @ (3 boxes)",
    "3 * 4 = @ - a lot",
    "3 * 4 = @, as 3 is given",
    "3 * 4 = @!",
    "3 * 4 = @kg",
    "3 * 4 = @\n",
    "3 * 4 = @, so x = 12",
    "20% of 60 is 12 and 3 * 4 = @",
]
NONE = [
    "12 + 7 = 20",
    "1 / 0 = 0",
    "12 + = 12",
    "= 12",
    "12 =",
    "==",
    "(" * 5000 + "= 1",
    "1 + " * 5000 + "1 = 5001",
    "9" * 5000 + " = " + "9" * 5000,
    "no equation",
    "#### 57",
    "",
    # a power is no product, and what is left of it no equation
    "2 ** 9 = 512",
    "2**3 = 3",
    "2 ** 3 = 3",
    "2^3 = 3",
    "3 = 3^2",
    "3 = 3**2",
    "2**3 = 3 * 4 = 12",
    r"\sqrt 16 = 16",
    "√16 = 16",
    "7 // 2 = 2",
    # digits with a mark between them are no two numbers
    "3$4 = 34",
    "3$4 = 4",
    "5%0 = 50",
    "5%0 = 0",
    "1.2.3 = 3",
    "1,2 = 2",
    "4:12 = 12",
    "3 4 = 4",
    "3 4 = 34",
    "12 = 12 4",
    # unknowns and functions
    "f(2) = 2",
    "x - 3 = -3",
    "x * 3 = 3",
    "3(4) = 4",
    "3 = 3(4)",
    "2(3) = 6",
    "5 = 5 + 3 = 8",
    "3 * 4 = 12 + 5 = 17",
    "2*6 = 3*5 = 15",
    "3*5 = 2*6 = 12",
    "3 <= 3",
    "3 != 3",
    "3 => 3",
    "- 3 + 5 = 2",  # a bullet: 3 + 5 is not 2
]


@pytest.mark.parametrize("step, value", PLAIN + [(step.replace("@", "12"), 12) for step in LAID_OUT])
def test_the_equation_of_a_step(step, value):
    assert equation_value(step) == Fraction(str(value))


@pytest.mark.parametrize("step", NONE, ids=lambda step: step[:20])
def test_no_equation_that_holds(step):
    assert equation_value(step) is None


@pytest.mark.parametrize("step", LAID_OUT)
def test_a_false_equation_stays_false_in_every_layout(step):
    assert equation_value(step.replace("@", "13")) is None


MARKERS = st.sampled_from(
    ["{}", "1. {}", "12) {}", "(3) {}", "- {}", "* {}", "• {}", "Step 2: {}", "**Step 4.** {}", "## {}"]
)
PHRASES = st.sampled_from(
    ["{}", "In 3 days: {}", "So Tom has 2 boxes, {}", "In all {} apples.", "{}.", "{}, that is all", "{} (3 more)"]
)
MARKS = st.sampled_from(["{}", "**{}**", r"\({}\)", r"\[ {} \]", "`{}`", "${}$", r"\( **{}** \)"])
SPELLINGS = st.fixed_dictionaries(
    {
        "+": st.just("+"),
        "-": st.sampled_from(["-", "−", "–"]),
        "*": st.sampled_from(["*", "×", "·", r"\times", r"\cdot", "x"]),
        "/": st.sampled_from(["/", "÷", r"\div"]),
    }
)
NUMBERS = st.integers(1, 400)


@given(NUMBERS, st.sampled_from("+-*/"), NUMBERS, st.integers(-3, 3), SPELLINGS, MARKS, PHRASES, MARKERS)
def test_layout_and_spelling_change_no_verdict(left, sign, right, error, spellings, marks, phrase, marker):
    if sign == "/":
        left *= right
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    step = f"{left} {spellings[sign]} {right} = {exact + error}"
    laid_out = marker.format(phrase.format(marks.format(step)))
    assert equation_value(laid_out) == (None if error else exact)


@given(st.text(alphabet="0123456789+-*/=().,$%^x \\n*_×", max_size=30))
def test_any_text_is_read_without_an_error(text):
    value = equation_value(text)
    assert value is None or isinstance(value, Fraction)


HOLDS = [
    "10 / 3 = 3.33",
    "10 / 3 = 3.3 km",
    "2 / 3 = 0.66",  # cut off
    "0.33 = 1 / 3",
    "3 + 4 = 7, so 7 * 2 = 14",
    "x = 3 * 4 = 12",
    "2^3 = 8 and 3 * 4 = 12",  # the first is not read
    "12 x (5/3) = 60/3 = 20",
    "2,430 – (1,250 + 850) = $2,430 – $2,100 = 330",
]
FALSE = [
    "12 + 7 = 20",
    "3 + 4 = 8, so 3 * 4 = 12",  # one false equation is enough
    "3 * 4 = 12 and 12 + 1 = 14",
    "12 x (5/3) = 25",
    "$32 - $20 = $300 left",
    "10 / 3 = 3",
    "10 / 3 = 3.4",
    "2 * 3.5 = 8",
    "3 * 4 = 12 + 5 = 17",
    "20 = 4 * 4",
    "5 - 8.5 = 3.5",
]
UNTOLD = [
    "So Tom has 57 apples.",
    "#### 57",
    "",
    "2^3 = 9",
    "x = 5",
    "x - 3 = 5",
    "20% of 50 = 11",
    "1.5 hours = 90 minutes",
    "1 = 100 cents",
    "1 / 2 = 50%",
    "7 / 2 = 3 remainder 1",
    "7 / 2 = 3 R1",
    "1 + 1 = 3%",
    "x+4=32-7",
    "(7 * V) + (4 * 5) = 69",
    "3x + 4 - 4 = 28 - 4",
    "100/5 = 5A/5",
    "26=5+3x",
    "half of (3 + 5) = 4",
    "¾ x 3/3 = 9/12",
    "4 / 3 = 1 and 1/3",
    "12 x 1 and 1/4 = 15",
    "3 / 1/4 = 12",
    "2.50 - 2.24 = 26 cents",
    "7 / 2 = 3 1/2",
    "3.33 * 3 = 10",
    "10 / 3 = 3.34",
    "f(2) = 3",
    "5 apples + 3 apples = 9 apples",
    "1 / 0 = 0",
    "9" * 5000 + " + 1 = " + "9" * 5000,
]


@pytest.mark.parametrize(
    "step, verdict",
    [(step, True) for step in HOLDS + [one.replace("@", "12") for one in LAID_OUT]]
    + [(step, False) for step in FALSE + [one.replace("@", "13") for one in LAID_OUT]]
    + [(step, None) for step in UNTOLD],
    ids=lambda value: str(value)[:25],
)
def test_whether_the_equations_of_a_step_hold(step, verdict):
    assert equations_hold(step) is verdict


@given(NUMBERS, st.sampled_from("+-*/"), NUMBERS, st.integers(-3, 3), SPELLINGS, MARKS, PHRASES, MARKERS)
def test_a_mistake_is_found_in_every_layout(left, sign, right, error, spellings, marks, phrase, marker):
    if sign == "/":
        left *= right
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    step = marker.format(phrase.format(marks.format(f"{left} {spellings[sign]} {right} = {exact + error}")))
    assert equations_hold(step) is (error == 0)


@given(st.text(alphabet="0123456789+-*/=().,$%^x \\n*_×", max_size=30))
def test_an_equation_that_has_a_value_is_never_called_false_alone(text):
    verdict = equations_hold(text)
    assert verdict in (True, False, None)
    if text.count("=") == 1 and equation_value(text) is not None:
        assert verdict is True
