"""Two answers to one prompt and a column that says which is better: HelpSteer, PKU-SafeRLHF, HALOs, SHP, arenas."""

from collections.abc import Callable
from typing import NamedTuple

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields, paired
from pipa_openrlhf.data.layouts.conversation import read_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import read_prompt
from pipa_openrlhf.data.record import Record


def _by_sign(value: object, name: str, where: str) -> int | None:
    """A strength from -3 to 3: below 0 the first is better."""
    number = fields.number(value)
    if number is None or not -3 <= number <= 3:
        fields.refuse(
            where, f"{name!r} is {fields.show(value)}", "give a number from -3 (the first) to 3 (the second)"
        )
    return None if number == 0 else int(number > 0)


def _by_index(value: object, name: str, where: str) -> int:
    """0 or 1, the number of the better one."""
    word = str(value).strip().lower()
    if word not in ("0", "1", "0.0", "1.0", "false", "true"):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give 0 or 1, or remove the row")
    return int(word in ("1", "1.0", "true"))


def _by_first(value: object, name: str, where: str) -> int:
    """1 where the first is better, else 0."""
    return 1 - _by_index(value, name, where)


def _by_winner(value: object, name: str, where: str) -> int | None:
    """``model_a`` or ``model_b``; what begins with "tie" or "both" is a tie."""
    word = str(value).strip().lower()
    if word.startswith(("tie", "both")):
        return None
    if word not in ("a", "b", "model_a", "model_b"):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give model_a, model_b or tie")
    return int(word.endswith("b"))


class Comparison(NamedTuple):
    """Columns of two answers, and of which is better: 0 the first, 1 the second, None neither; ``scores``, where the
    data have them, must not say the opposite."""

    first: str
    second: str
    better: str
    read: Callable[[object, str, str], int | None]
    scores: tuple[str, str] | None = None


COMPARISONS = (
    Comparison("response_1", "response_2", "preference_strength", _by_sign),
    Comparison("response1", "response2", "overall_preference", _by_sign),
    Comparison("response_0", "response_1", "better_response_id", _by_index),
    Comparison("output_A", "output_B", "label", _by_first, ("reward_A", "reward_B")),
    Comparison("human_ref_A", "human_ref_B", "labels", _by_first, ("score_A", "score_B")),
    Comparison("response_a", "response_b", "winner", _by_winner),
    Comparison("conversation_a", "conversation_b", "winner", _by_winner),
)
COLUMNS = ("response1 and response2", "overall_preference")
READING = (
    "two answers, the better one by its column (" + ", ".join(f"`{one.better}`" for one in COMPARISONS[:-1]) + "); a "
    "tie is no pair"
)
EXAMPLE = {"prompt": "1+1=", "response_1": "3", "response_2": "2", "preference_strength": 2}


def _comparison(row: dict) -> Comparison | None:
    return next((one for one in COMPARISONS if all(name in row for name in one[:3])), None)


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has the columns of one of the comparisons, and none that name the better side themselves."""
    return _comparison(row) is not None and not paired.fits(row, flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """A pair, or nothing where the answers are equally good."""
    found = _comparison(row)
    if found is None:
        fields.refuse(where, "no two answers and a column that compares them", "see docs/data.md for their names")
    better = found.read(fields.column(row, found.better, where), found.better, where)
    answers = [read_answer(row, name, where) for name in (found.first, found.second)]
    # SHP's post; elsewhere `history` is the turns before the prompt.
    is_post = found.first == "human_ref_A" and isinstance(row.get("history"), str)
    prompt = fields.text(row["history"], "history", where) if is_post else read_prompt(row, flags, where)
    if better is None or _is_tie_by_scores(row, found, better, where):
        return []
    if prompt is None and answers[0].messages is None:
        fields.column(row, "prompt", where)
    return pair_records(row, where, index, flags, prompt, answers[better], answers[1 - better])


def _is_tie_by_scores(row: dict, found: Comparison, better: int, where: str) -> bool:
    """Whether the scores are equal: HALOs writes its label as whether A's is the higher one, which is 0 of equal ones
    too. Scores that say the opposite of the label are refused."""
    first, second = (fields.number(row.get(name)) for name in found.scores or ("", ""))
    if first is None or second is None:
        return False
    if first != second and better != int(second > first):
        problem = f"{found.better!r} contradicts {' and '.join(map(repr, found.scores or ()))}"
        fields.refuse(where, problem, "correct one of them or remove the row")
    return first == second
