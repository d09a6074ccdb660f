"""Several ranked answers to one prompt: Nectar's, NeMo-RL's."""

import math

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import paired
from pipa_openrlhf.data.layouts.conversation import to_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import read_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("prompt", "answers")
READING = (
    "the answer of the lowest rank against that of the highest (of equals the first), others are not used; where all "
    "ranks are equal it is a tie and no pair: the row yields nothing"
)
EXAMPLE = {"prompt": "1+1=", "answers": [{"answer": "2", "rank": 1}, {"answer": "3", "rank": 2}]}
# The list and, in each of its items, the answer.
LISTS = (("answers", "answer"), ("completions", "completion"))


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there is a list of answers with ranks, and no columns that name the sides."""
    return _ranked_list(row) is not None and not paired.fits(row, flags)


def _ranked_list(row: dict) -> tuple[str, str, list[dict]] | None:
    for name, key in LISTS:
        items = _items(row.get(name))
        if items and all(isinstance(item, dict) and key in item and "rank" in item for item in items):
            return name, key, items
    return None


def _items(value: object) -> list | None:
    """A list of objects; a Parquet file may hold an object of lists instead."""
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        if len({len(item) for item in value.values()}) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Two records, or none where no answer is better than another."""
    found = _ranked_list(row)
    if found is None:
        names = " or ".join(f"'{name}' ({{{key!r}, 'rank'}})" for name, key in LISTS)
        fields.refuse(where, f"no list of ranked answers {names}", "add it to the row, or remove the row")
    name, key, items = found
    fields.column(row, name, where)
    ranks = [_rank(item["rank"], f"{name}[{number}].rank", where) for number, item in enumerate(items)]
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    if ranks[best] == ranks[worst]:
        return []
    chosen, rejected = (to_answer(items[one][key], f"{name}[{one}].{key}", where) for one in (best, worst))
    return pair_records(row, where, index, flags, read_prompt(row, flags, where), chosen, rejected)


def _rank(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a rank is a number, the best answer's the lowest")
    return float(value)
