"""The public layouts of two answers and a preference, and what their preferences say."""

import math
from collections.abc import Callable
from typing import NamedTuple

from pipa_openrlhf.data import fields

# What a rule returns: the better one, 0 or 1; None for a tie.
Rule = Callable[[object, str, str], int | None]


def _signed(value: object, name: str, where: str) -> int | None:
    number = to_number(value, name, where)
    if not -3 <= number <= 3:
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a preference is from -3 (first) to 3 (second)")
    return None if number == 0 else int(number > 0)


def _index(value: object, name: str, where: str) -> int:
    number = to_number(value, name, where)
    if number not in (0, 1):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give 0 for the first answer or 1 for the second")
    return int(number)


def _is_a(value: object, name: str, where: str) -> int:
    number = to_number(value, name, where)
    if number not in (0, 1):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give 1 where A is better or 0 where B is")
    return 1 - int(number)


WINNERS = {"model_a": 0, "response_a": 0, "a": 0, "model_b": 1, "response_b": 1, "b": 1}
TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad")


def _winner(value: object, name: str, where: str) -> int | None:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in WINNERS and text not in TIES:
        fields.refuse(where, f"{name!r} is {fields.show(value)}", 'give "model_a", "model_b" or "tie"')
    return WINNERS.get(text)


def to_number(value: object, name: str, where: str) -> float:
    """A number, or its text in a CSV file."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give the number that says which answer is better")
    return number


class Comparison(NamedTuple):
    """One public layout.

    Attributes:
        scores: columns of the scores that the preference was made from: where they are equal it is a tie.
        prompt: the prompt's column, where its name is not one of the usual ones.
    """

    first: str
    second: str
    preference: str
    rule: Rule
    scores: tuple[str, str] | None = None
    prompt: str | None = None


KNOWN = (
    Comparison("response_1", "response_2", "preference_strength", _signed),
    Comparison("response1", "response2", "overall_preference", _signed),
    Comparison("response_0", "response_1", "better_response_id", _index),
    Comparison("output_A", "output_B", "label", _is_a, ("reward_A", "reward_B")),
    Comparison("human_ref_A", "human_ref_B", "labels", _is_a, prompt="history"),
    Comparison("conversation_a", "conversation_b", "winner", _winner),
    Comparison("response_a", "response_b", "winner", _winner),
)


def comparison(row: dict) -> Comparison | None:
    """The public layout that the row has."""
    return next((one for one in KNOWN if all(name in row for name in one[:3])), None)
