"""AlphaMath's paths: steps with the Q values of a tree search."""

import json
import re
from dataclasses import replace

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.record import FROM_Q_VALUES, Record

COLUMNS = ("instruction", "output")
READING = "a path of steps with Q values; the last Q, 1 or -1, says whether the answer is right"
EXAMPLE = {
    "instruction": "<question> 1+1? </question>",
    "output": [{"step": "1+1=3", "Q": 0.4}, {"step": "It is 3.", "Q": -1}],
}

TOOL_OUTPUT = re.compile(r"<output>.*?</output>", re.DOTALL)
QUESTION = re.compile(r"\s*<question>(.*)</question>\s*", re.DOTALL)


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has this layout's columns, and steps with values in them, as a list or its JSON text."""
    output = row.get("output")
    if isinstance(output, str):
        return "instruction" in row and output.lstrip().startswith("[")
    steps = isinstance(output, list) and all(isinstance(node, dict) and "step" in node for node in output)
    return "instruction" in row and steps


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{instruction, output}``: a path of steps with Q values, the last of which says whether the answer is right."""
    path = read_path(row, where)
    steps = [fields.text(node.get("step"), f"output[{number}].step", where) for number, node in enumerate(path)]
    # Some of the published steps end with the newline that is put between steps.
    steps = [step.removesuffix(flags.step_separator) for step in steps[:-1]] + steps[-1:]
    q_values = read_q_values(path, where)
    if abs(q_values[-1]) != 1:
        fields.refuse(where, f"the last step has Q {q_values[-1]}", "it must be 1 (right answer) or -1 (wrong)")
    answer_label = int(q_values[-1] > 0)
    step_labels = [1 if answer_label else int(q >= flags.step_threshold) for q in q_values]

    prompt, question = _alphamath_prompt(row, where)
    conversation = join(prompt, Answer("output", steps), flags, where)
    conversation = replace(conversation, identity=question)
    spans = tuple(
        (number, *match.span())
        for number, step in enumerate(steps)
        for match in (TOOL_OUTPUT.finditer(step) if flags.mask_tool_output else ())
    )
    return [
        make_record(
            row,
            where,
            conversation,
            step_labels=step_labels,
            answer_label=answer_label,
            label_source=FROM_Q_VALUES,
            masked_spans=spans,
        )
    ]


def read_path(row: dict, where: str) -> list[dict]:
    """The steps of a row, at least one, with their text and values.

    Raises:
        UserError: the row has none.
    """
    output = fields.column(row, "output", where)
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


def read_q_values(path: list[dict], where: str) -> list[float]:
    """The steps' Q, each in [-1, 1].

    Raises:
        UserError: one is no such number.
    """
    return [fields.q_value(node.get("Q"), f"output[{number}].Q", where) for number, node in enumerate(path)]


def _alphamath_prompt(row: dict, where: str) -> tuple[str, str]:
    """Prompt and question. ``instruction`` may already be in its tags."""
    instruction = fields.text(fields.column(row, "instruction", where), "instruction", where)
    extra = fields.text(row.get("input") or "", "input", where, may_be_empty=True)
    extra = f"\n{extra}" if extra else ""
    tagged = QUESTION.fullmatch(instruction)
    if tagged:
        return f"{instruction}{extra}\n", tagged.group(1).strip() + extra
    return f"<question> {instruction}{extra} </question>\n", instruction.strip() + extra
