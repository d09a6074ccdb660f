"""Several answers to one problem, each an object with its text and whether it is right: GSM8K's model solutions."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt, to_answer
from pipa_openrlhf.data.record import Record

COLUMNS = ("responses", "is_correct")
READING = "a record for each object with a text and `is_correct`, in a list or in columns of their own"
EXAMPLE = {
    "question": "1+1=",
    "responses": [{"text": "It is 2", "is_correct": True}, {"text": "It is 3", "is_correct": False}],
}
LISTS = ("responses", "answers", "solutions", "generations", "samples", "rollouts")
TEXTS = ("solution", "text", "answer", "response", "completion", "output", "content")
CORRECT = ("is_correct", "correct", "label")


def _answers(row: dict) -> list[tuple[str, dict]]:
    """Place and object of every answer."""
    found = []
    for name, value in row.items():
        if _is_answer(value):
            found.append((name, value))
        elif name in LISTS and isinstance(value, list) and value and all(map(_is_answer, value)):
            found += [(f"{name}[{number}]", one) for number, one in enumerate(value)]
    return found


def _is_answer(value: object) -> bool:
    return isinstance(value, dict) and _key(value, TEXTS) is not None and _key(value, CORRECT) is not None


def _key(value: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in value), None)


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there is such an answer."""
    return bool(_answers(row))


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{question, responses: [{text, is_correct}, ...]}`` and ``{question, MODEL: {solution, is_correct}, ...}``."""
    records = []
    for place, one in _answers(row):
        row.get(place.split("[")[0])  # it is read
        text, correct = _key(one, TEXTS) or TEXTS[0], _key(one, CORRECT) or CORRECT[0]
        answer = _in_lines(to_answer(one[text], f"{place}.{text}", where), flags)
        conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
        answer_label = fields.label(one[correct], f"{place}.{correct}", where)
        records.append(make_record(row, where, conversation, step_labels=None, answer_label=answer_label))
    return records


def _in_lines(answer: Answer, flags: DataConfig) -> Answer:
    """The same text, cut after each line end that lines follow; an empty line belongs to the one before."""
    if answer.messages is not None or len(answer.steps) > 1 or flags.step_separator != "\n":
        return answer
    steps: list[str] = []
    for line in answer.steps[0].split("\n"):
        if line.strip() or not steps:
            steps.append(line)
        else:
            steps[-1] += f"\n{line}"
    return Answer(answer.name, steps)
