"""MATH-APS and other searches of OmegaPRM's kind: a tree of beginnings with the share of right rollouts from each."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import ENDED, labelled_record
from pipa_openrlhf.data.record import Record

COLUMNS = ("question", "reasoning_steps")
READING = (
    "a record for every leaf of a search tree, given as a tree or as a list of beginnings; a step is right whose "
    "`mc_value` is `--data.step_threshold` or more; a leaf that ends in an answer and has the value 1 or 0 is a right "
    "or wrong answer, another one a beginning"
)
EXAMPLE = {
    "question": "1+1+1=",
    "reasoning_steps": [
        {"solution_prefix": "1+1+1=", "mc_value": 0.5},
        {"solution_prefix": "1+1+1=\n\n1+1=2", "mc_value": 0.75},
        {"solution_prefix": "1+1+1=\n\n1+1=2\n\nThe answer is: 4", "mc_value": 0.0},
    ],
}


@dataclass(frozen=True)
class Leaf:
    """The steps from the question to a leaf and their values."""

    steps: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    def then(self, step: str, value: float) -> "Leaf":
        """With one more step; a text of nothing but space is none."""
        return Leaf((*self.steps, step), (*self.values, value)) if step.strip() else self


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether ``reasoning_steps`` is a tree with values, or a list of beginnings with values."""
    found = row.get("reasoning_steps")
    if isinstance(found, list):
        return bool(found) and all(isinstance(one, dict) and "solution_prefix" in one for one in found)
    return isinstance(found, dict) and "text" in found and "children" in found


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """A record a leaf; a tree of nothing but the question has none."""
    question = fields.text(fields.column(row, "question", where), "question", where)
    found = fields.column(row, "reasoning_steps", where)
    if isinstance(found, dict):
        leaves = list(_of_tree(found, question, Leaf(), "reasoning_steps", where))
    elif isinstance(found, list):
        leaves = list(_of_list(found, question, where))
    else:
        fields.refuse(where, f"'reasoning_steps' is {fields.show(found)}", "give a tree or a list of beginnings")
    return [_record(row, where, flags, question, leaf) for leaf in leaves if leaf.steps]


def _value(node: object, place: str, where: str) -> float:
    value = node.get("mc_value") if isinstance(node, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        fields.refuse(where, f"'{place}.mc_value' is {fields.show(value)}", "give the share of right rollouts, 0 to 1")
    return float(value)


def _of_tree(node: dict, so_far: str, path: Leaf, place: str, where: str) -> Iterator[Leaf]:
    """``text`` is a node's own part or all from the question on; the root's is the question."""
    text = fields.text(node.get("text"), f"{place}.text", where, may_be_empty=True)
    whole = text.startswith(so_far)
    path = path.then(text[len(so_far) :] if whole else text, _value(node, place, where))
    children = node.get("children") or []
    if not children:
        yield path
    for number, child in enumerate(children):
        if not isinstance(child, dict):
            fields.refuse(where, f"'{place}.children[{number}]' is {fields.show(child)}", "give an object with 'text'")
        text_so_far = text if whole else f"{so_far}\n\n{text}"
        yield from _of_tree(child, text_so_far, path, f"{place}.children[{number}]", where)


def _of_list(nodes: list, question: str, where: str) -> Iterator[Leaf]:
    """A node's parent is the longest text that it goes on from; one found twice by the search has its mean value."""
    values: dict[str, list[float]] = {}
    for number, node in enumerate(nodes):
        place = f"reasoning_steps[{number}]"
        value = _value(node, place, where)
        text = fields.text(node.get("solution_prefix"), f"{place}.solution_prefix", where)
        if not text.startswith(question):
            fields.refuse(where, f"'{place}.solution_prefix' does not begin with the question", "correct the row")
        values.setdefault(text, []).append(value)
    above = {text: [other for other in values if _goes_on(text, other)] for text in values}
    inner = {text for texts in above.values() for text in texts}
    for text, found in values.items():
        if text in inner or text == question:
            continue
        path, before = Leaf(), question
        for step in sorted({*above[text], text} - {question}, key=len):
            path, before = path.then(step[len(before) :], sum(values[step]) / len(values[step])), step
        yield from [path] * len(found)


def _goes_on(text: str, start: str) -> bool:
    """Whether ``text`` begins with the other, which ends at a space."""
    return len(text) > len(start) and text.startswith(start) and (text[len(start)].isspace() or start[-1].isspace())


def _record(row: dict, where: str, flags: DataConfig, question: str, leaf: Leaf) -> Record:
    last = leaf.values[-1]
    complete = last in (0, 1) and ENDED.search(leaf.steps[-1]) is not None
    labels: list[int | None] = [int(value >= flags.step_threshold) for value in leaf.values]
    return labelled_record(
        row,
        where,
        flags,
        leaf.steps,
        labels,
        name="reasoning_steps",
        answer_label=int(last) if complete else None,
        complete=complete,
        prompt=question,
    )
