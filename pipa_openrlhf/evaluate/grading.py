"""Find the final answer in a text, and compare it with the right one where that needs no algebra.

What needs some goes to math-verify, in ``grader.py``.
"""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
# JSON writes 0.00005 as 5e-05. Longer exponents are not those of a float, and would take for ever.
_NUMBER = re.compile(rf"([-+]?)\s*(?:\\?\$)?\s*({_DIGITS}(?:e[-+]?\d{{1,3}})?)(?:\s*/\s*([-+]?{_DIGITS}))?")
_FINAL_ANSWER = re.compile(r"final answer\s*:(.*)", re.IGNORECASE)
# What surrounds an answer without being part of it: bold, a math or dollar sign, a percent sign, a full stop.
_MARKS_BEFORE = re.compile(r"(?:\*|\\?\$|\s)+")
_MARKS_AFTER = re.compile(r"(?:\*|\\?\$|\\?%|\.|\s)+$")
_DELIMITERS_AROUND = re.compile(r"^(?:\*|\\?\$|\\[(\[]|\s)+|(?:\*|\\?\$|\\[)\]]|\.|\s)+$")
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|[ \t]+([^\s$\\{}]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """The answer a text commits to, or None where it has no marker.

    Markers, in this order: the first ``####`` line (what follows it may answer another question), the last
    ``\\boxed{}``, the last ``Final Answer:`` line. Markers inside ``<think>...</think>`` do not count.
    """
    text = _without_thoughts(text)
    if "####" in text:
        answer = text.split("####", 1)[1].split("\n", 1)[0]
    elif (boxed := last_boxed(text)) is not None:
        answer = boxed
    elif found := _FINAL_ANSWER.findall(text):
        answer = found[-1]
    else:
        return None
    inner = last_boxed(answer)
    answer = (answer if inner is None else inner).strip()
    return answer or None


def committed_answer(text: str, finished: bool = True) -> str | None:
    """The answer of a text that may have been stopped for length.

    The last line of an unfinished text is cut off somewhere, so only the lines before it count.
    """
    return extract_answer(text if finished else text.rpartition("\n")[0])


def compare_plainly(prediction: str, gold: str) -> bool | None:
    """Compare what needs no algebra; None where the two must be read as mathematics.

    Two numbers are compared exactly, and the same text up to case, spaces and marks is the same answer. Braces that do
    not match would let a prediction out of the ``\\boxed{}`` that it is read in: it is wrong.
    """
    numbers = parse_number(prediction), parse_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _bare(prediction) == _bare(gold):
        return True
    return None if _has_matched_braces(prediction) else False


def as_mathematics(answer: str) -> str:
    """The answer as LaTeX that math-verify reads whole."""
    answer = _DELIMITERS_AROUND.sub("", answer)
    # A dollar sign would end the formula, and "3$4" must not become 34.
    return "$\\boxed{" + answer.replace("\\$", " ").replace("$", " ").strip() + "}$"


def parse_number(text: str) -> Fraction | None:
    """``"$1,200.50"``, ``"3/4"``, ``"50%"``, ``"5e-05"``, ``"57."`` as an exact number; None for anything else.

    A percent sign is dropped as a dollar sign is: 50% is 50. A mark between digits makes the text no number.
    """
    found = _NUMBER.fullmatch(_bare(text))
    if found is None:
        return None
    try:
        top, bottom = (Fraction(part.replace(",", "")) for part in (found[1] + found[2], found[3] or "1"))
        return top / bottom
    except (ValueError, ZeroDivisionError):
        return None


def _bare(text: str) -> str:
    """Lower case, single spaces, and no marks at either end."""
    text = " ".join(text.replace("−", "-").split()).lower()
    text = _MARKS_AFTER.sub("", text)
    marks = _MARKS_BEFORE.match(text)
    return text[marks.end() :] if marks else text


def _without_thoughts(text: str) -> str:
    """The text outside think blocks; a prompt may have opened one, and an unfinished text may not close its last."""
    outside, opened, rest = text.partition("<think>")
    while opened:
        _, closed, rest = rest.partition("</think>")
        if not closed:
            break
        before, opened, rest = rest.partition("<think>")
        outside += before
    return outside.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` or ``\\fbox{}`` holds; ``\\boxed 5`` holds one word. None where it is not closed."""
    *_, found = [None, *_BOX.finditer(text)]
    if found is None:
        return None
    if found[1] is not None:
        return found[1]
    depth = 1
    for brace in _BRACE.finditer(text, found.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[found.end() : brace.start()]
    return None


def _has_matched_braces(text: str) -> bool:
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return False
    return depth == 0
