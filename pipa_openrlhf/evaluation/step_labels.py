"""Label the steps of a worked answer by rule, against the steps of a right one."""

import ast
import operator
import re
from fractions import Fraction

from pipa_openrlhf.evaluation.grading import parse_number

_EQUATION = re.compile(r"([-\d.,+*/() ]+)=\s*\$?(-?[\d.,]*\d)")
_LONGEST_EXPRESSION = 100
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


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


def equation_value(step: str) -> Fraction | None:
    """Right-hand side of the step's last equation; None where there is no equation or it does not hold."""
    equations = _EQUATION.findall(step)
    if not equations:
        return None
    left, right = equations[-1]
    value = parse_number(right)
    return value if value is not None and _evaluate(left) == value else None


def _evaluate(expression: str) -> Fraction | None:
    expression = expression.replace(",", "").strip()
    if len(expression) > _LONGEST_EXPRESSION:
        return None
    try:
        return _evaluate_node(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _evaluate_node(node: ast.expr) -> Fraction:
    """KeyError for anything but + - * / on numbers, powers among them."""
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right))
    if isinstance(node, ast.UnaryOp):
        return {ast.USub: operator.neg, ast.UAdd: operator.pos}[type(node.op)](_evaluate_node(node.operand))
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    raise KeyError(type(node))
