"""Several answers to one prompt with ranks, 0 or 1 the best: Nectar, NeMo-RL."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields, paired
from pipa_openrlhf.data.layouts.conversation import to_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import read_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("answers", "rank")
READING = "the answer of the lowest rank against that of the highest; all of one rank are no pair"
EXAMPLE = {"prompt": "1+1=", "answers": [{"answer": "3", "rank": 2}, {"answer": "2", "rank": 1}]}
LISTS = (("answers", "answer"), ("completions", "completion"), ("responses", "response"))


def _list(row: dict) -> tuple[str, str] | None:
    for name, text in LISTS:
        items = row.get(name)
        if isinstance(items, list) and items and all(isinstance(one, dict) and "rank" in one for one in items):
            if text in items[0]:
                return name, text
    return None


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has a list of answers with ranks, and no columns that name the better side themselves."""
    return _list(row) is not None and not paired.fits(row, flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, answers: [{answer, rank}]}`` and ``{context, completions: [{completion, rank}]}``."""
    found = _list(row)
    if found is None:
        fields.refuse(where, "no list of answers with ranks", 'give "answers": [{"answer": ..., "rank": 1}, ...]')
    name, text = found
    ranks = [_rank(one["rank"], f"{name}[{number}].rank", where) for number, one in enumerate(row[name])]
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    prompt = read_prompt(row, flags, where)
    if ranks[best] == ranks[worst]:
        return []
    chosen, rejected = (to_answer(row[name][one].get(text), f"{name}[{one}].{text}", where) for one in (best, worst))
    return pair_records(row, where, index, flags, prompt, chosen, rejected)


def _rank(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a rank is a number")
    return float(value)
