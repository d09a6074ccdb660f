"""Public data that say of no answer whether it is right or better: they are refused, each with what helps."""

from typing import NoReturn

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import paired
from pipa_openrlhf.data.layouts.comparisons import comparison
from pipa_openrlhf.data.record import Record

COLUMNS = ("prompt", "response", "helpfulness")
READING = (
    "refused: HelpSteer's scores of single answers (take its comparisons, or make pairs), and collections of prompts "
    "without answers"
)
EXAMPLE = {"prompt": "1+1=", "response": "2", "helpfulness": 4, "correctness": 4, "coherence": 4}
ATTRIBUTES = ("helpfulness", "correctness", "coherence")
ANSWERS = ("response", "completion", "completions", "output", "answer", "answers")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has attribute scores or prompts only."""
    if flags.input_key or paired.fits(row, flags) or comparison(row):
        return False
    return _is_scored(row) or ("context_messages" in row and not any(name in row for name in ANSWERS))


def _is_scored(row: dict) -> bool:
    return all(name in row for name in ("response", *ATTRIBUTES)) and "label" not in row


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Refuse the row."""
    _refuse(where, _is_scored(row))


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Refuse the data set."""
    _refuse(dataset, any(map(_is_scored, rows)))


def _refuse(where: str, scored: bool) -> NoReturn:
    if scored:
        fields.refuse(
            where,
            f"{', '.join(ATTRIBUTES)} score single answers and say of none whether it is right or the better one",
            "take the data set's comparisons (HelpSteer2: the folder preference), or write the two answers to a "
            "prompt as 'chosen' and 'rejected', or a 'label' beside each as 'completion'",
        )
    fields.refuse(
        where,
        "it holds prompts only, without answers or labels",
        "take a data set of answers, or let python -m pipa_openrlhf.cli.sample write some to problems with solutions",
    )
