"""Answers as a list of objects, each a step and its rating."""

import logging

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import decide_prefixes, is_complete, labelled_record
from pipa_openrlhf.data.record import Record

log = logging.getLogger(__name__)

COLUMNS = ("problem", "steps")
READING = (
    "one answer, its steps objects with a text and a rating (1, 0 neutral, -1), a label or a score; its own label is "
    "`answer_label` where there is one, else the last step's; neutral steps by `--data.neutral_step`"
)
EXAMPLE = {"problem": "1+1+1=", "steps": [{"step": "1+1=2", "rating": 1}, {"step": "2+1=4", "rating": -1}]}
TEXTS = ("step", "text", "content")
RATINGS = ("rating", "label", "score", "value")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether ``steps`` is a list of objects with a text and a rating."""
    steps = row.get("steps")
    return isinstance(steps, list) and bool(steps) and all(map(_is_rated, steps))


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Decide ``--data.prefixes``, and say how neutral steps are taken: TRL takes them for wrong, openr for right."""
    log.info(f"{dataset}: steps rated neutral (0) are taken as --data.neutral_step {flags.neutral_step} says")
    rated = (row["steps"] for row in rows if fits(row, flags))
    return decide_prefixes((steps[-1][_key(steps[-1], TEXTS)] for steps in rated), flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{problem, steps: [{step, rating}, ...]}``."""
    steps = fields.column(row, "steps", where)
    if not isinstance(steps, list) or not all(map(_is_rated, steps)):
        fields.refuse(where, f"'steps' is {fields.show(steps)}", "give a list of objects with 'step' and 'rating'")
    labels = [_label(step, f"steps[{number}]", where, flags) for number, step in enumerate(steps)]
    texts = [step[_key(step, TEXTS)] for step in steps]
    given = row.get(flags.label_key or "answer_label")
    answer = None if given is None else fields.label(given, flags.label_key or "answer_label", where)
    complete = is_complete(texts[-1] if texts else "", flags)
    last = labels[-1] if labels and complete and answer is None else answer
    known = answer is not None
    return [
        labelled_record(
            row, where, flags, texts, labels, name="steps", answer_label=last, given=known, complete=complete
        )
    ]


def _is_rated(step: object) -> bool:
    return isinstance(step, dict) and bool(_key(step, TEXTS)) and bool(_key(step, RATINGS))


def _key(step: dict, names: tuple[str, ...]) -> str:
    """The first that is there, one with a value before others."""
    present = [name for name in names if name in step]
    return next((name for name in present if step[name] is not None), present[0] if present else "")


def _label(step: dict, place: str, where: str, flags: DataConfig) -> int | None:
    """A rating 0 is neutral; a label 0 is wrong. Null: not rated."""
    name = _key(step, RATINGS)
    value = step[name]
    if value is None:
        return None
    if name == "rating" and fields.number(value) == 0:
        return fields.NEUTRAL[flags.neutral_step]
    return fields.score(value, f"{place}.{name}", where, flags.step_threshold)
