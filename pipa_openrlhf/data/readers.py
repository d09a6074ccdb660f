"""Rows of every public format to Records, one function a format."""

import json
import re
from types import SimpleNamespace

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.conversation import Answer, Conversation, join, join_rejected, read_answer, read_prompt
from pipa_openrlhf.data.record import Record

TOOL_OUTPUT = re.compile(r"<output>.*?</output>", re.DOTALL)
QUESTION = re.compile(r"\s*<question>(.*)</question>\s*", re.DOTALL)


def read_unpaired(row: dict, where: str, index: int, flags: SimpleNamespace) -> list[Record]:
    """``{prompt, completion, label}``: one answer, right or wrong."""
    answer = read_answer(row, "completion", where)
    answer_label = fields.label(fields.column(row, "label", where), "label", where)
    conversation = join(_needed_prompt(row, answer, flags, where), answer, flags, where)
    return [_record(row, where, conversation, None, answer_label)]


def read_stepwise(row: dict, where: str, index: int, flags: SimpleNamespace) -> list[Record]:
    """``{prompt, completions: [...], labels: [...]}``: one answer; its label is its last step's."""
    completions = fields.column(row, "completions", where)
    if not isinstance(completions, list):
        fields.refuse(where, f"'completions' is {fields.show(completions)}", "give a list with one text a step")
    answer = Answer("completions", _step_texts(completions, where))
    step_labels = fields.labels(fields.column(row, "labels", where), "labels", len(answer.steps), where)
    conversation = join(_needed_prompt(row, answer, flags, where), answer, flags, where)
    return [_record(row, where, conversation, step_labels, step_labels[-1])]


def read_paired(row: dict, where: str, index: int, flags: SimpleNamespace) -> list[Record]:
    """``{prompt, chosen, rejected}``, with steps also ``rejected_labels`` (and ``chosen_labels``, default all 1)."""
    prompt = read_prompt(row, flags, where)
    chosen = join(prompt, read_answer(row, flags.chosen_key, where), flags, where)
    rejected = join_rejected(prompt, read_answer(row, flags.rejected_key, where), chosen, flags, where)
    chosen_labels = _optional_labels(row, "chosen_labels", chosen.answer, where)
    rejected_labels = _optional_labels(row, "rejected_labels", rejected.answer, where)
    if chosen_labels is None and rejected_labels is not None:
        chosen_labels = [1] * len(chosen.answer.steps)
    return [
        _record(row, where, chosen, chosen_labels, 1, pair_id=index),
        _record(row, where, rejected, rejected_labels, 0, pair_id=index),
    ]


def read_alphamath(row: dict, where: str, index: int, flags: SimpleNamespace) -> list[Record]:
    """``{instruction, output}``: a path of steps with Q values, the last of which says whether the answer is right."""
    path = _alphamath_path(fields.column(row, "output", where), where)
    steps = [fields.text(node.get("step"), f"output[{number}].step", where) for number, node in enumerate(path)]
    q_values = [fields.q_value(node.get("Q"), f"output[{number}].Q", where) for number, node in enumerate(path)]
    if abs(q_values[-1]) != 1:
        fields.refuse(where, f"the last step has Q {q_values[-1]}", "it must be 1 (right answer) or -1 (wrong)")
    answer_label = int(q_values[-1] > 0)
    step_labels = [1 if answer_label else int(q >= flags.step_threshold) for q in q_values]

    prompt, question = _alphamath_prompt(row, where)
    conversation = join(prompt, Answer("output", steps), flags, where)
    conversation = Conversation(conversation.prompt, conversation.answer, identity=question)
    spans = tuple(
        (number, *match.span())
        for number, step in enumerate(steps)
        for match in (TOOL_OUTPUT.finditer(step) if flags.mask_tool_output else ())
    )
    return [_record(row, where, conversation, step_labels, answer_label, masked_spans=spans)]


FORMATS = {
    "paired": read_paired,
    "stepwise": read_stepwise,
    "unpaired": read_unpaired,
    "alphamath": read_alphamath,
}


def detect_format(row: dict, where: str, flags: SimpleNamespace) -> str:
    """The format whose columns the row has.

    Raises:
        UserError: it has those of none.
    """
    needed = {
        "paired": (flags.chosen_key, flags.rejected_key),
        "stepwise": ("completions", "labels"),
        "unpaired": ("completion", "label"),
        "alphamath": ("instruction", "output"),
    }
    for name, columns in needed.items():
        if all(column in row for column in columns):
            return name
    wanted = ", ".join(f"{name} ({' and '.join(columns)})" for name, columns in needed.items())
    problem = f"no known format has the columns {', '.join(map(str, row)) or '(none)'}"
    return fields.refuse(where, problem, f"rename them to those of one of {wanted}")


def read_records(rows: list[tuple[str, dict]], flags: SimpleNamespace) -> tuple[str, list[Record]]:
    """Format and Records of rows, in order; a bad row ends the reading.

    Raises:
        UserError: names file, line, the problem and what to do.
    """
    chosen = flags.format
    if chosen == "auto":
        where, row = rows[0]
        chosen = detect_format(row, where, flags)
    read = FORMATS[chosen]
    records = [record for index, (where, row) in enumerate(rows) for record in read(row, where, index, flags)]
    return chosen, records


def _record(
    row: dict, where: str, conversation: Conversation, step_labels: list[int] | None, answer_label: int, **more
) -> Record:
    return Record(
        prompt=conversation.prompt,
        steps=conversation.answer.steps,
        step_labels=step_labels,
        answer_label=answer_label,
        problem_id=_problem_id(row, conversation.identity, where),
        where=where,
        messages=conversation.answer.messages,
        **more,
    )


def _problem_id(row: dict, default: str, where: str) -> str:
    value = row.get("problem_id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        fields.refuse(where, f"'problem_id' is {fields.show(value)}", "give text or a whole number")
    return str(value)


def _needed_prompt(row: dict, answer: Answer, flags: SimpleNamespace, where: str) -> str | list[dict] | None:
    """Only pairs, and messages that hold the whole conversation, may do without a prompt column."""
    prompt = read_prompt(row, flags, where)
    if prompt is None and answer.messages is None:
        fields.column(row, "prompt", where)
    return prompt


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


def _optional_labels(row: dict, name: str, answer: Answer, where: str) -> list[int] | None:
    value = row.get(name)
    return None if value is None else fields.labels(value, name, len(answer.steps), where)


def _alphamath_path(output: object, where: str) -> list[dict]:
    if isinstance(output, str):
        try:
            output = json.loads(output)
        except json.JSONDecodeError as error:
            fields.refuse(where, f"'output' is no JSON ({error})", "give a JSON list of steps with 'step' and 'Q'")
    if not isinstance(output, list) or not all(isinstance(node, dict) for node in output):
        fields.refuse(where, f"'output' is {fields.show(output)}", "give a list of steps with 'step' and 'Q'")
    if not output:
        fields.refuse(where, "'output' has no steps", "give at least one or remove the row")
    return output


def _alphamath_prompt(row: dict, where: str) -> tuple[str, str]:
    """Prompt and question. ``instruction`` may already be in its tags."""
    instruction = fields.text(fields.column(row, "instruction", where), "instruction", where)
    extra = fields.text(row.get("input") or "", "input", where, may_be_empty=True)
    extra = f"\n{extra}" if extra else ""
    tagged = QUESTION.fullmatch(instruction)
    if tagged:
        return f"{instruction}{extra}\n", tagged.group(1).strip() + extra
    return f"<question> {instruction}{extra} </question>\n", instruction.strip() + extra
