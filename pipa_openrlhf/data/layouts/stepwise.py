"""Single answers in steps, each step with a label."""

import re
from dataclasses import replace

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt
from pipa_openrlhf.data.layouts.labelled import ENDED, PRM800K_ANSWER
from pipa_openrlhf.data.layouts.prompts import prompt_column
from pipa_openrlhf.data.record import FROM_COLUMN, FROM_STEPS, Record
from pipa_openrlhf.errors import UserError

COLUMNS = ("completions", "labels")
READING = "one answer in steps; its own label is `answer_label` where there is one, else the last step's"
EXAMPLE = {"prompt": "1+1+1=", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}

# What a list of whole answers has in each of them.
FINAL_ANSWER = re.compile(r"^# Answer\b|\\boxed\{|####|\banswer is\b", re.IGNORECASE | re.MULTILINE)
# Sampled answers of one problem may continue each other too, once in a while.
RARE = 0.05
FIRST_STEP = re.compile(r"\s*step 1\b", re.IGNORECASE)


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has this layout's columns."""
    return all(name in row for name in COLUMNS)


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Decide ``--data.prefixes``, and refuse lists of whole answers.

    Raises:
        UserError: most rows look like several answers rather than one.
    """
    answers = [row["completions"] for row in rows if isinstance(row.get("completions"), list)]
    several = [steps for steps in answers if len(steps) > 1 and all(isinstance(step, str) for step in steps)]
    if flags.format == "auto" and 2 * sum(map(_are_whole_answers, several)) > len(several):
        raise UserError(
            f"{dataset}: 'completions' looks like several whole answers, not the steps of one; say which it is by "
            "--data.format best_of_n or --data.format stepwise"
        )
    if flags.prefixes != "auto":
        return flags
    return replace(flags, prefixes="true" if _are_beginnings(rows, flags) else "false")


def _are_beginnings(rows: list[dict], flags: DataConfig) -> bool:
    """Whether rows continue each other, not by a rare chance, or some end as answers of PRM800K do."""
    rows = [row for row in rows if isinstance(row.get("completions"), list) and row["completions"]]
    marked = [PRM800K_ANSWER.search(str(row["completions"][-1])) for row in rows]
    prompts = [str(row.get(prompt_column(row, flags) or "prompt")) for row in rows]
    begun = {(prompt, str(row["completions"][:-1])) for prompt, row in zip(prompts, rows)}
    continued = sum((prompt, str(row["completions"])) in begun for prompt, row in zip(prompts, rows))
    return any(marked) or continued > RARE * len(rows)


def _are_whole_answers(completions: list[str]) -> bool:
    return all(map(FINAL_ANSWER.search, completions)) or sum(map(bool, map(FIRST_STEP.match, completions))) > 1


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completions: [...], labels: [...]}``, one answer or the beginning of one."""
    completions = fields.column(row, "completions", where)
    if not isinstance(completions, list):
        fields.refuse(where, f"'completions' is {fields.show(completions)}", "give a list with one text a step")
    answer = Answer("completions", _step_texts(completions, where))
    values = fields.column(row, "labels", where)
    step_labels = fields.labels(values, "labels", len(answer.steps), where, flags.step_threshold, flags.neutral_step)
    complete = flags.prefixes != "true" or ENDED.search(answer.steps[-1]) is not None
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    given = row.get(flags.label_key or "answer_label")
    of_answer = None if given is None else fields.label(given, flags.label_key or "answer_label", where)
    answer_label = step_labels[-1] if of_answer is None and complete else of_answer
    source = FROM_STEPS if of_answer is None else FROM_COLUMN
    labels = {"step_labels": step_labels, "answer_label": answer_label, "label_source": source}
    return [make_record(row, where, conversation, complete=complete, **labels)]


def _step_texts(completions: list, where: str) -> list[str]:
    """Steps given as strings, as assistant messages, or as lists of one assistant message."""
    flat = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in completions]
    if not fields.is_messages(flat):
        return fields.steps(flat, "completions", where)
    messages = fields.messages(flat, "completions", where)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            problem = f"'completions[{number}]' is a {message['role']} message"
            fields.refuse(where, problem, "steps are the assistant's; put other messages into the prompt")
    return fields.steps([message["content"] for message in messages], "completions", where)
