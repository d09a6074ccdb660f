"""Two answers to one prompt and a column that says which is better."""

import math
from collections.abc import Callable
from typing import NamedTuple

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import paired
from pipa_openrlhf.data.layouts.conversation import read_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import read_prompt, to_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("response_1", "response_2", "preference_strength")
READING = (
    "the better of two answers is chosen: a `preference_strength` (HelpSteer2) or `overall_preference` (HelpSteer3) "
    "below 0 means the first; `better_response_id` (PKU-SafeRLHF) counts from 0; `label` (HALOs) or `labels` (SHP) 1 "
    "means A; `winner` (Chatbot Arena) names it. A tie is no pair: the row yields nothing"
)
EXAMPLE = {"prompt": "1+1=", "response_1": "2", "response_2": "3", "preference_strength": -2}

# What a rule returns: the better one, 0 or 1; None for a tie.
Rule = Callable[[object, str, str], int | None]


def _signed(value: object, name: str, where: str) -> int | None:
    number = _number(value, name, where)
    if not -3 <= number <= 3:
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a preference is from -3 (first) to 3 (second)")
    return None if number == 0 else int(number > 0)


def _index(value: object, name: str, where: str) -> int:
    number = _number(value, name, where)
    if number not in (0, 1):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give 0 for the first answer or 1 for the second")
    return int(number)


def _is_a(value: object, name: str, where: str) -> int:
    number = _number(value, name, where)
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


def _number(value: object, name: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or math.isnan(number):
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


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are two answers and a preference, and no columns that name the sides."""
    return comparison(row) is not None and not paired.fits(row, flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Two records, or none for a tie."""
    found = comparison(row)
    if found is None:
        problem = "no two answers with a preference that are known"
        fields.refuse(where, problem, f"name them {' and '.join(COLUMNS)}")
    better = _better(row, found, where)
    if better is None:
        return []
    if found.prompt and not flags.prompt_key:
        given = fields.column(row, found.prompt, where)
        prompt: str | list[dict] | None = to_prompt(given, found.prompt, flags, where)
    else:
        prompt = read_prompt(row, flags, where)
    names = (found.first, found.second)
    chosen, rejected = (read_answer(row, names[side], where) for side in (better, 1 - better))
    return pair_records(row, where, index, flags, prompt, chosen, rejected)


def _better(row: dict, found: Comparison, where: str) -> int | None:
    better = found.rule(fields.column(row, found.preference, where), found.preference, where)
    if found.scores is None or any(row.get(name) is None for name in found.scores):
        return better
    first, second = (_number(row[name], name, where) for name in found.scores)
    if first == second:
        return None
    if better != int(second > first):
        problem = f"{found.preference!r} is {fields.show(row[found.preference])} beside {found.scores[0]!r} {first}"
        fields.refuse(where, f"{problem} and {found.scores[1]!r} {second}", "correct one of them or remove the row")
    return better
