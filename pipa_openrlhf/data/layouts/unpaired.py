"""Single answers, each right or wrong."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import tagged
from pipa_openrlhf.data.layouts.conversation import join, make_record, needed_prompt, read_answer, to_answer
from pipa_openrlhf.data.layouts.prompts import to_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("completion", "label")
READING = "one answer, right or wrong"
EXAMPLE = {"prompt": "1+1=", "completion": "2", "label": True}


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has this layout's columns, or the user named them and they hold no steps with labels."""
    if flags.input_key:
        return not tagged.fits(row, flags)
    return all(name in row for name in (COLUMNS[0], flags.label_key or COLUMNS[1]))


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completion, label}``, or the columns that ``--data.input_key`` and its like name."""
    label_key = flags.label_key or "label"
    if flags.input_key:
        return [_by_keys(row, where, flags, flags.input_key, label_key)]
    answer = read_answer(row, "completion", where)
    answer_label = fields.label(fields.column(row, label_key, where), label_key, where)
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    return [make_record(row, where, conversation, step_labels=None, answer_label=answer_label)]


def _by_keys(row: dict, where: str, flags: DataConfig, input_key: str, label_key: str) -> Record:
    """Without ``--data.output_key``, the input is a whole conversation, whose last message is the answer."""
    for name, key in (("input", input_key), ("output", flags.output_key), ("label", label_key)):
        if key is not None and key not in row:
            fields.refuse(where, f"no column {key!r}, which --data.{name}_key names", f"it has {', '.join(row)}")
    given = fields.column(row, input_key, where)
    if flags.output_key:
        answer = read_answer(row, flags.output_key, where)
    elif isinstance(given, list) and len(given) > 1:
        given, answer = given[:-1], to_answer(given[-1:], input_key, where)
    else:
        problem = f"{input_key!r} is no conversation of two messages or more"
        fields.refuse(where, problem, "give --data.output_key for the answer")
    conversation = join(to_prompt(given, input_key, flags, where), answer, flags, where)
    answer_label = fields.label(fields.column(row, label_key, where), label_key, where)
    return make_record(row, where, conversation, step_labels=None, answer_label=answer_label)
