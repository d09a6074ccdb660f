"""Single answers in steps, each step with a label."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt
from pipa_openrlhf.data.record import FROM_LAST_STEP, Record

COLUMNS = ("completions", "labels")


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completions: [...], labels: [...]}``: one answer; its label is its last step's."""
    completions = fields.column(row, "completions", where)
    if not isinstance(completions, list):
        fields.refuse(where, f"'completions' is {fields.show(completions)}", "give a list with one text a step")
    answer = Answer("completions", _step_texts(completions, where))
    step_labels = fields.labels(fields.column(row, "labels", where), "labels", len(answer.steps), where)
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    return [make_record(row, where, conversation, step_labels, step_labels[-1], FROM_LAST_STEP)]


def _step_texts(completions: list, where: str) -> list[str]:
    """Steps given as strings, as assistant messages, or as lists of one assistant message."""
    flat = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in completions]
    if not fields.is_messages(flat):
        return fields.steps(flat, "completions", where)
    for number, message in enumerate(fields.messages(flat, "completions", where)):
        if message["role"] != "assistant":
            problem = f"'completions[{number}]' is a {message['role']} message"
            fields.refuse(where, problem, "steps are the assistant's; put other messages into the prompt")
    return fields.steps([message["content"] for message in flat], "completions", where)
