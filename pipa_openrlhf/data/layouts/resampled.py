"""Rollouts of a model that reasons, from the beginning or from a place within: math-rollouts."""

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.layouts.labelled import ENDED
from pipa_openrlhf.data.record import Record

COLUMNS = ("full_cot", "rollout or solution", "is_correct")
READING = (
    "one answer, right or wrong by `is_correct`: the end of `full_cot` that is `rollout` or `solution`; all before "
    "that is the prompt; without a final answer it is a beginning"
)
EXAMPLE = {
    "full_cot": "1+1+1= <think>\nIt is 2+1.\nThat is 3. \\boxed{3}",
    "rollout": "\nThat is 3. \\boxed{3}",
    "is_correct": True,
}
ANSWERS = ("rollout", "solution")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether a text of the whole stands beside the part that the model wrote."""
    return isinstance(row.get("full_cot"), str) and "is_correct" in row and any(name in row for name in ANSWERS)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{full_cot, rollout, is_correct}``, and the first solution's ``{full_cot, solution, is_correct}``."""
    name = next((name for name in ANSWERS if row.get(name) is not None), ANSWERS[0])
    text = fields.text(fields.column(row, name, where), name, where)
    whole = fields.text(fields.column(row, "full_cot", where), "full_cot", where)
    if not whole.endswith(text):
        fields.refuse(where, f"'full_cot' does not end with {name!r}", "correct it or remove the row")
    label = fields.label(fields.column(row, "is_correct", where), "is_correct", where)
    conversation = join(whole.removesuffix(text), Answer(name, [text]), flags, where)
    complete = ENDED.search(text) is not None
    return [make_record(row, where, conversation, step_labels=None, answer_label=label, complete=complete)]
