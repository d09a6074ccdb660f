"""PRM800K as OpenAI published it: at each step several continuations, rated -1, 0 or 1, one of which goes on."""

import logging
import math

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import PRM800K_ANSWER, labelled_record
from pipa_openrlhf.data.record import Record

log = logging.getLogger(__name__)

COLUMNS = ("question", "label")
READING = (
    "a record for each rated step that is not continued and one for the path that is; it has a label as an answer "
    'where it ends in "# Answer"; a step that a human wrote is right; neutral steps by `--data.neutral_step`'
)
EXAMPLE = {
    "question": {"problem": "1+1+1="},
    "label": {
        "steps": [
            {"completions": [{"text": "1+1=2", "rating": 1}], "human_completion": None, "chosen_completion": 0},
            {
                "completions": [{"text": "2+1=4", "rating": -1}, {"text": "# Answer\n\n3", "rating": 1}],
                "human_completion": None,
                "chosen_completion": 1,
            },
        ],
        "finish_reason": "solution",
    },
}
RATINGS: dict[object, int] = {1: 1, -1: 0}

Path = list[tuple[str, int | None]]


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether question and label are objects, the one with a problem, the other with steps."""
    question, label = row.get("question"), row.get("label")
    return isinstance(question, dict) and "problem" in question and isinstance(label, dict) and "steps" in label


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Say how neutral steps are taken, since programs differ: TRL takes them for wrong, openr for right."""
    log.info(f"{dataset}: steps rated neutral (0) are taken as --data.neutral_step {flags.neutral_step} says")
    return flags


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Rows of both phases; one whose steps have no texts yields none."""
    question, label = fields.column(row, "question", where), fields.column(row, "label", where)
    if not isinstance(question, dict) or not isinstance(label, dict) or not isinstance(label.get("steps"), list):
        fields.refuse(where, "'question' or 'label.steps' is missing", "give PRM800K's rows as they are published")
    prompt = fields.text(question.get("problem"), "question.problem", where)
    return [_record(row, where, flags, prompt, path) for path in _paths(label["steps"], where, flags)]


def _paths(steps: list, where: str, flags: DataConfig) -> list[Path]:
    """Every way from the first step to one that is not continued, in the order of the data."""
    found: list[Path] = []
    path: Path = []
    for number, step in enumerate(steps):
        place = f"label.steps[{number}]"
        if not isinstance(step, dict):
            fields.refuse(where, f"{place!r} is {fields.show(step)}", "give an object with 'completions'")
        options = [
            _rated(option, f"{place}.completions[{rank}]", where, flags)
            for rank, option in enumerate(step.get("completions") or [])
        ]
        chosen = step.get("chosen_completion")
        if isinstance(chosen, float):  # tables make floats of whole numbers among nulls
            chosen = None if math.isnan(chosen) else int(chosen) if chosen.is_integer() else chosen
        found += [[*path, option] for rank, option in enumerate(options) if rank != chosen]
        if chosen is not None:
            if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(options):
                problem = f"'{place}.chosen_completion' is {fields.show(chosen)}, of {len(options)} completions"
                fields.refuse(where, problem, "correct it or remove the row")
            path = [*path, options[chosen]]
        elif step.get("human_completion"):
            human = {**step["human_completion"]}
            human["rating"] = 1 if human.get("rating") is None else human["rating"]
            path = [*path, _rated(human, f"{place}.human_completion", where, flags)]
        else:
            break  # nothing was taken to go on with
    return [*found, path] if path else found


def _rated(option: object, place: str, where: str, flags: DataConfig) -> tuple[str, int | None]:
    if not isinstance(option, dict):
        fields.refuse(where, f"{place!r} is {fields.show(option)}", "give an object with 'text' and 'rating'")
    return fields.text(option.get("text"), f"{place}.text", where), rating(
        option.get("rating"), f"{place}.rating", where, flags
    )


def rating(value: object, place: str, where: str, flags: DataConfig) -> int | None:
    """Label of a step rated 1, 0 (neutral), -1, or not at all (null)."""
    if value is None:
        return None
    if isinstance(value, bool) or value not in (-1, 0, 1):
        fields.refuse(where, f"{place!r} is {fields.show(value)}", "a rating is -1, 0, 1 or null")
    return RATINGS.get(value, fields.NEUTRAL[flags.neutral_step])


def _record(row: dict, where: str, flags: DataConfig, prompt: str, path: Path) -> Record:
    complete = PRM800K_ANSWER.search(path[-1][0]) is not None
    return labelled_record(
        row,
        where,
        flags,
        [text for text, _ in path],
        [label for _, label in path],
        name="label.steps",
        answer_label=path[-1][1] if complete else None,
        complete=complete,
        prompt=prompt,
    )
