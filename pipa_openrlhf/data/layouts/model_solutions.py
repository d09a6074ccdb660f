"""A column for each model, with its solution and whether it is right: GSM8K's example_model_solutions."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("question", "a column for each model")
READING = "a record for each column that holds `solution` and `is_correct`; its lines are steps without labels"
EXAMPLE = {
    "question": "1+1=",
    "ground_truth": "2",
    "small": {"is_correct": False, "solution": "3"},
    "large": {"is_correct": True, "solution": "2"},
}


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether a column holds a solution and says whether it is right."""
    return bool(_columns(row))


def _columns(row: dict) -> list[str]:
    return [
        name for name, value in row.items() if isinstance(value, dict) and value.keys() >= {"is_correct", "solution"}
    ]


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{question, <model>: {solution, is_correct}, ...}``."""
    names = _columns(row)
    if not names:
        problem = "no column holds an object with 'solution' and 'is_correct'"
        fields.refuse(where, problem, "add one or remove the row")
    return [_record(row, name, where, flags) for name in names]


def _record(row: dict, name: str, where: str, flags: DataConfig) -> Record:
    solution = fields.text(row[name]["solution"], f"{name}.solution", where)
    lines = solution.split(flags.step_separator)
    # The text stays as it is, blank lines too: they would be empty steps.
    answer = Answer(f"{name}.solution", lines if all(lines) else [solution])
    label = fields.label(row[name]["is_correct"], f"{name}.is_correct", where)
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    return make_record(row, where, conversation, step_labels=None, answer_label=label)
