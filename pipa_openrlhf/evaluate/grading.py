"""Find the final answer in a text and compare it with the right one."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
# JSON writes 0.00005 as 5e-05. Longer exponents are not those of a float, and would take for ever.
_NUMBER = re.compile(rf"([-+]?)\s*(?:\\?\$)?\s*({_DIGITS}(?:e[-+]?\d{{1,3}})?)(?:\s*/\s*([-+]?{_DIGITS}))?")
_FINAL_ANSWER = re.compile(r"final answer\s*:(.*)", re.IGNORECASE)
# What surrounds an answer without being part of it: bold, a math or dollar sign, a percent sign, a full stop.
_MARKS_BEFORE = re.compile(r"(?:\*|\\?\$|\s)+")
_MARKS_AFTER = re.compile(r"(?:\*|\\?\$|\\?%|\.|\s)+$")
_LOOSE_SPACE = re.compile(r"\s+(?=[,)\]}])|(?<=[,(\[{])\s+")


def extract_answer(text: str) -> str | None:
    """The answer a text commits to, or None where it has no marker.

    Markers, in this order: the first ``####`` line (what follows it may answer another question), the last
    ``\\boxed{}``, the last ``Final Answer:`` line. Markers inside ``<think>...</think>`` do not count.
    """
    text = _without_thoughts(text)
    if "####" in text:
        answer = text.split("####", 1)[1].split("\n", 1)[0]
    elif (boxed := _last_boxed(text)) is not None:
        answer = boxed
    elif found := _FINAL_ANSWER.findall(text):
        answer = found[-1]
    else:
        return None
    inner = _last_boxed(answer)
    answer = (answer if inner is None else inner).strip()
    return answer or None


def is_same_answer(prediction: str, gold: str) -> bool:
    """True where both are the same number, or, where either is no number, the same text up to spaces and case."""
    numbers = parse_number(prediction), parse_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return numbers[0] is numbers[1] and _LOOSE_SPACE.sub("", _bare(prediction)) == _LOOSE_SPACE.sub("", _bare(gold))


def is_right(text: str, gold: str, finished: bool = True) -> bool:
    """True where the text commits to the right answer.

    The last line of an unfinished text is cut off somewhere, so only the lines before it count.
    """
    prediction = extract_answer(text if finished else text.rpartition("\n")[0])
    return prediction is not None and is_same_answer(prediction, gold)


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


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
