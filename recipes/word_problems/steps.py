"""Label the steps of a worked answer by rule, against the steps of a right one."""

import ast
import operator
import os
import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


def split_steps(text: str) -> list[str]:
    """Lines of an answer; joined by newlines they are the answer again.

    A blank line stays with the line before it (at the start: the one after it), so that no step is empty.
    """
    steps: list[str] = []
    for line in text.split("\n"):
        if steps and (not line or not steps[-1].strip("\n")):
            steps[-1] += "\n" + line
        else:
            steps.append(line)
    return steps


def label_steps(steps: list[str], gold_steps: list[str], answer_is_right: bool) -> list[bool]:
    """One label a step; the last step's is the answer's.

    All steps of a right answer are right. In a wrong answer a step is right while its equation holds, its value is
    the gold step's value at that position, and every step before it was right; the last step is wrong.
    """
    if answer_is_right:
        return [True] * len(steps)
    labels = []
    for step, gold_step in zip(steps[:-1], gold_steps):
        value = equation_value(step)
        if value is None or value != equation_value(gold_step):
            break
        labels.append(True)
    return labels + [False] * (len(steps) - len(labels))


def split_words(text: str) -> list[str]:
    """Words of an answer with the blanks before them, a line's end with its last word; joined they are the answer."""
    return re.findall(r"\s*?\S+(?:[^\S\n]*\n)*(?:\s+\Z)?", text) or [text]


def label_words(words: list[str], gold_steps: list[str], answer_is_right: bool) -> list[bool | None]:
    """One label a word: what stands before a mistake is right, the mistake is wrong, what follows has no label.

    All words of a right answer are right. In a wrong one the mistake is the first word that is not the worked
    answer's; sums and products may be told either way round. An answer that only stops early is wrong at its last
    word, one that goes on where it should end at the first word too many.
    """
    if answer_is_right:
        return [True] * len(words)
    right = _common_words([word.strip() for word in words], gold_steps)
    right = min(right, len(words) - 1)
    return [True] * right + [False] + [None] * (len(words) - right - 1)


def _swapped(words: list[str]) -> list[str]:
    """``a + b = c`` as ``b + a = c``, a product likewise; anything else as it is."""
    if len(words) == 5 and words[1] in "+*":
        return [words[2], words[1], words[0], *words[3:]]
    return words


def _common_words(words: list[str], gold_steps: list[str]) -> int:
    """How many of the first ``words`` are those of the worked steps, each of them one way round or the other."""
    start = 0
    for step in gold_steps:
        told = step.split()
        matching = max(len(os.path.commonprefix([words[start:], way])) for way in (told, _swapped(told)))
        start += matching
        if matching < len(told):
            break
    return start


_LONGEST_EXPRESSION = 60  # tokens
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

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
    (re.compile(r"−|(?<=[\d)])\s*–\s*(?=[\d(])"), "-"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)"), "*"),
    (re.compile(r"(?<![\d)])\\?\$(?=[\d.])"), ""),  # dollars
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
    """One side of an equals sign: its value, None where it cannot be told. ``whole``: nothing else stands there."""

    value: Fraction | None
    whole: bool


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


def _plain(step: str) -> str:
    """Without marks of layout, and with one spelling of every operator."""
    text = _STRONG.sub(r"\2", step)
    text = text[_MARKER.match(text).end() :]
    if emphasised := _EMPHASIS.fullmatch(text):
        text = emphasised[2]
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text


def _tokens(text: str) -> list[_Token]:
    return [_Token(found.lastgroup, found[0], *found.span()) for found in _TOKEN.finditer(text)]


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
    return _Side(_evaluate(run), before is None)


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
    return _Side(_evaluate(run), after is None)


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
        return {ast.USub: operator.neg, ast.UAdd: operator.pos}[type(node.op)](_evaluate_node(node.operand))
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    raise KeyError(type(node))
