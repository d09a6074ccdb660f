"""The equations that a step of an answer states, however it is laid out, and whether they hold."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

_LONGEST_EXPRESSION = 60  # tokens
# After a right-hand side that is no plain result, and before a left-hand side that is part of a larger one.
_NO_PLAIN_RESULT = re.compile(r"%|percent|cents?|¢|r\d*|rem|remainder")
_JOINING = re.compile(r"of|x|times|plus|minus|over|by")
_MIXED_NUMBER = re.compile(r"(?<=\d) and (?=\(?\d+/\d)")
_ROUNDING = Fraction(1, 100)  # relative
_SIGNS: dict[type, Callable[[Fraction], Fraction]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

# Pairs around a text; what they hold stays. A lone pair of stars between numbers is a power.
_STRONG = re.compile(r"(?<![\w*)])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w*(])")
_EMPHASIS = re.compile(r"\s*([*_])(?=[^\s*_])(.+)(?<=[^\s*_])\1\s*")
_MARKER = re.compile(
    r"""(?: \s*
        (?: (?:[-+*•>]|\#+)\s+                                  # bullets, quotes, headings
        |   \(\d{1,3}\)\s+(?![-+*/=]\s)                         # (1)
        |   step\s*\d+(?:\.\d+)*\s*(?:[:.)]|[-–—](?=\s))*\s*    # Step 2:
        ))*""",
    re.IGNORECASE | re.VERBOSE,
)
_SPELLINGS = (
    (re.compile(r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[×✕✖·⋅∙]"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])|[÷∕⁄]"), "/"),
    (re.compile(r"(?<![\d)])\\?\$(?=[\d.])"), ""),  # dollars
    (re.compile(r"−|(?<=[\d)])\s*–\s*(?=[\d(])"), "-"),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])"), "*"),
    (re.compile(r"\\?\$|\\[()\[\],;:!]|`"), " "),  # the ends of mathematics and of code
)
_TOKEN = re.compile(
    r"""(?P<number>\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)
    |   (?P<foreign>\*\*+|//+|[\^√∛±]|\\[a-zA-Z]+|(?<=\d)[,.:%](?=\d))   # mathematics that is not read here
    |   (?P<equals>=)
    |   (?P<arithmetic>[-+*/()])
    |   (?P<word>[^\W\d]\w*)
    |   (?P<other>\S)""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


class _Side(NamedTuple):
    """One side of an equals sign: its value, None where it cannot be told. ``whole``: nothing else stands there.

    ``run``: the tokens of the value; ``next``: the one before them on the left, the one after them on the right.
    """

    value: Fraction | None
    whole: bool
    run: tuple[_Token, ...] = ()
    next: _Token | None = None

    @property
    def decimals(self) -> int:
        """Digits behind the point, the most that one of its numbers has."""
        return max((len(one.text.partition(".")[2]) for one in self.run if one.kind == "number"), default=0)

    @property
    def is_number(self) -> bool:
        """Whether it is one number, with or without a sign."""
        return sum(one.kind == "number" for one in self.run) == 1

    def is_rounded(self, exact: Fraction) -> bool:
        """Whether it is ``exact``, rounded to its decimals or cut off after them; a whole number never is."""
        if self.value is None or not self.is_number or not self.decimals:
            return False
        error, unit = abs(exact) - abs(self.value), Fraction(1, 10**self.decimals)
        return exact * self.value >= 0 and -unit / 2 <= error < unit


def equation_value(step: str) -> Fraction | None:
    """Right-hand side of the step's last equation; None where there is no equation or it does not hold.

    Numbers with ``+ - * /`` and brackets are read, also written ``×``, ``÷`` or ``\\times``, in ``\\( \\)``, bold, in
    a list, or after words. An equation ``a = b = c`` holds where all its sides are equal.
    """
    sections = _split_at_equals(_tokens(_plain(step)))
    value, holds, chained = None, True, False
    for left, right in pairwise(sections):
        left_side, right_side = _last_expression(left), _first_expression(right)
        if left_side is None or right_side is None:
            chained = False
            continue
        true = left_side.value is not None and left_side.value == right_side.value
        holds = true and (holds or not chained)
        value = right_side.value if holds else None
        chained = right_side.whole
    return value


def equations_hold(step: str) -> bool | None:
    """Whether all equations of a step hold; None where it has none of which that can be told.

    A side of one decimal number may be rounded or cut off in its last digit. Not judged: what is read only in part
    (powers, unknowns, units before the sign), a number equal to another number (``1.5 h = 90 min``), a per cent, a
    remainder, and numbers that rounding before may explain (``3.33 * 3 = 10``).
    """
    sections = _split_at_equals(_tokens(_MIXED_NUMBER.sub(" ", _plain(step))))
    verdicts = [_equation_holds(left, right) for left, right in pairwise(sections)]
    if False in verdicts:
        return False
    return True if True in verdicts else None


def _equation_holds(left_section: list[_Token], right_section: list[_Token]) -> bool | None:
    left, right = _last_expression(left_section), _first_expression(right_section)
    if left is None or right is None or left.value is None or right.value is None:
        return None
    error = abs(left.value - right.value)
    if error == 0 or left.is_rounded(right.value) or right.is_rounded(left.value):
        return True
    if (left.is_number and right.is_number) or _is_part(left, right):
        return None
    is_rounded = left.decimals or right.decimals
    return None if is_rounded and error < _ROUNDING * max(abs(left.value), abs(right.value)) else False


def _is_part(left: _Side, right: _Side) -> bool:
    """Whether a side may be a part of what stands there: ``x + 4 =``, ``half of (3 + 5) =``, ``= 5A``, ``3 / 1/4``."""
    before, after = left.next, right.next
    if before is not None:
        word = before.text.lower()
        if _JOINING.fullmatch(word) or (left.run[0].text in "+-*/" and (before.kind == "word" or word == ")")):
            return True
    if after is not None:
        is_unknown = len(after.text) == 1 and after.kind == "word" and after.start == right.run[-1].end
        if is_unknown or _NO_PLAIN_RESULT.fullmatch(after.text.lower()):
            return True
    return any(re.search(r"/ \S+ /", " ".join(one.text for one in side.run)) for side in (left, right))


def _plain(step: str) -> str:
    """Without marks of layout, and with one spelling of every operator."""
    text = _STRONG.sub(r"\2", step)
    marker = _MARKER.match(text)
    text = text[marker.end() :] if marker else text
    if emphasised := _EMPHASIS.fullmatch(text):
        text = emphasised[2]
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text


def _tokens(text: str) -> list[_Token]:
    return [_Token(str(found.lastgroup), found[0], *found.span()) for found in _TOKEN.finditer(text)]


def _split_at_equals(tokens: list[_Token]) -> list[list[_Token]]:
    sections: list[list[_Token]] = [[]]
    for token in tokens:
        if token.kind == "equals":
            sections.append([])
        else:
            sections[-1].append(token)
    return sections


def _last_expression(section: list[_Token]) -> _Side | None:
    """What stands before an equals sign; None where that is no arithmetic."""
    run = _arithmetic_at_start(section[::-1], opening=")")[::-1]
    before = section[-len(run) - 1] if len(run) < len(section) else None
    follows_word = before is not None and before.kind == "word"
    if not run or (follows_word and len(run) == 1):
        return None  # "x = ", "20% of 50 = "
    is_dash = run[0].text in "+-" and len(run) > 1 and run[1].start > run[0].end
    is_call = run[0].text == "(" and before is not None and before.end == run[0].start
    if before is not None and (before.kind == "foreign" or (follows_word and (is_dash or is_call))):
        return _Side(None, False)  # "2^3 = ", "x - 3 = ", "f(2) = "
    return _Side(_evaluate(run), before is None, tuple(run), before)


def _first_expression(section: list[_Token]) -> _Side | None:
    """What stands after an equals sign; None where that is no arithmetic."""
    run = _arithmetic_at_start(section, opening="(")
    for index in range(1, len(run)):
        if run[index].text == "(" and run[index - 1].text not in "+-*/(" and run[index].start > run[index - 1].end:
            run = run[:index]  # "= 12 (3 boxes)"
            break
    if run and run[-1].text == "-":
        run = run[:-1]  # "= 12 - a lot"
    if not run:
        return None
    after = section[len(run)] if len(run) < len(section) else None
    if after is not None and (after.kind == "foreign" or (after.text == "(" and after.start == run[-1].end)):
        return _Side(None, False)
    return _Side(_evaluate(run), after is None, tuple(run), after)


def _arithmetic_at_start(tokens: list[_Token], opening: str) -> list[_Token]:
    """The tokens up to the first that is no arithmetic, or a bracket without its partner."""
    unclosed: list[int] = []
    end = len(tokens)
    for index, token in enumerate(tokens):
        is_bracket = token.text in ("(", ")")
        if token.kind not in ("number", "arithmetic") or (is_bracket and token.text != opening and not unclosed):
            end = index
            break
        if is_bracket:
            unclosed.append(index) if token.text == opening else unclosed.pop()
    return tokens[: unclosed[0] if unclosed else end]


def _evaluate(tokens: list[_Token]) -> Fraction | None:
    """Value of an expression; numbers are written as fractions, which Python reads exactly."""
    if len(tokens) > _LONGEST_EXPRESSION:
        return None
    try:
        texts = [f"({Fraction(one.text.replace(',', ''))})" if one.kind == "number" else one.text for one in tokens]
        return _evaluate_node(ast.parse(" ".join(texts), mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError):
        return None


def _evaluate_node(node: ast.expr) -> Fraction:
    """KeyError for anything but + - * / on whole numbers."""
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right))
    if isinstance(node, ast.UnaryOp):
        return _SIGNS[type(node.op)](_evaluate_node(node.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise KeyError(type(node))
