"""Two answers to one prompt and a column that says which is better."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import paired
from pipa_openrlhf.data.layouts.comparisons import Comparison, comparison, to_number
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
    if found.prompt and flags.prompt_key in (None, found.prompt):
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
    first, second = (to_number(row[name], name, where) for name in found.scores)
    if first == second:
        return None
    if better != int(second > first):
        problem = f"{found.preference!r} is {fields.show(row[found.preference])} beside {found.scores[0]!r} {first}"
        fields.refuse(where, f"{problem} and {found.scores[1]!r} {second}", "correct one of them or remove the row")
    return better
