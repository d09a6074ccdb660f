"""Several answers to one problem, each in steps with labels or values and with a label of its own."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import labelled_record
from pipa_openrlhf.data.record import Record

COLUMNS = ("problem", "responses")
READING = (
    "a record for each answer; steps by their labels, or else by their values and `--data.step_threshold`; the answer "
    "by `is_correct`, or else by its last step"
)
EXAMPLE = {
    "problem": "1+1+1=",
    "responses": [
        {"steps": ["1+1=2", "2+1=4"], "step_labels": [1, 0], "step_values": [0.8, 0.1], "is_correct": False},
        {"steps": ["1+1=2", "2+1=3"], "step_labels": [1, 1], "step_values": [0.8, 1.0], "is_correct": True},
    ],
}
LISTS = ("responses", "rollouts", "solutions", "generations", "samples")
LABELS = ("step_labels", "labels", "step_values", "values", "step_scores", "step_rewards")
CORRECT = ("is_correct", "correct", "final_answer_correct")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there is a list of answers with steps and something about each."""
    return _list_name(row) is not None


def _list_name(row: dict) -> str | None:
    return next((name for name in LISTS if _are_rated(row.get(name))), None)


def _are_rated(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_rated, value))


def _is_rated(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("steps"), list) and any(name in one for name in LABELS)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{problem, responses: [{steps, step_labels, step_values, is_correct}, ...]}``."""
    name = _list_name(row)
    if name is None:
        problem = f"no list of answers ({', '.join(LISTS)}) with 'steps' and {' or '.join(LABELS[:3:2])}"
        fields.refuse(where, problem, "add it to the row, or remove the row")
    return [_record(row, where, flags, f"{name}[{number}]", one) for number, one in enumerate(row[name])]


def _record(row: dict, where: str, flags: DataConfig, place: str, answer: dict) -> Record:
    name = _present(answer, LABELS)
    if name is None:
        fields.refuse(where, f"the steps of {place!r} have no labels", f"give {' or '.join(LABELS[:3:2])}")
    steps, labels = answer["steps"], answer[name]
    if isinstance(labels, list) and len(labels) == len(steps) + 1 and name.startswith("step_v"):
        problem = f"{len(labels)} '{place}.{name}' for {len(steps)} steps"
        fields.refuse(where, problem, "give one value a step, leaving out the question's")
    rated = fields.labels(labels, f"{place}.{name}", len(steps), where, flags.step_threshold, flags.neutral_step)
    correct = _present(answer, CORRECT)
    label = rated[-1] if rated and correct is None else None
    if correct is not None:
        label = fields.label(answer[correct], f"{place}.{correct}", where)
    given = correct is not None
    return labelled_record(row, where, flags, steps, rated, name=f"{place}.steps", answer_label=label, given=given)


def _present(answer: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if answer.get(name) is not None), None)
