"""Single answers, each right or wrong."""

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import tagged
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt, read_answer, to_answer
from pipa_openrlhf.data.layouts.prompts import complete_prompt, to_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("completion", "label")
READING = (
    "one answer, right or wrong. Also `response`, `output`, `answer`, `solution` or `generation` beside `label`, "
    "`is_correct`, `correct`, `score`, `reward` or `acc` that is 1 or 0, and `messages` or `conversations` whose last "
    "one is the answer"
)
EXAMPLE = {"prompt": "1+1=", "completion": "2", "label": True}

ANSWERS = ("completion", "response", "output", "answer", "solution", "generation")
LABELS = ("label", "is_correct", "correct", "score", "reward", "acc")
CONVERSATIONS = ("messages", "conversations", "conversation")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has an answer and a label of it."""
    if flags.input_key:
        return not tagged.fits(row, flags)
    return _label_name(row, flags) is not None and (_answer_name(row) or _conversation(row)) is not None


def _label_name(row: dict, flags: DataConfig) -> str | None:
    if flags.label_key:
        return flags.label_key if flags.label_key in row else None
    if row.get(LABELS[0]) is not None or LABELS[0] in row:
        return None if isinstance(row[LABELS[0]], list | dict) and len(row[LABELS[0]]) != 1 else LABELS[0]
    return next((name for name in LABELS if fields.is_label(row.get(name))), None)


def _answer_name(row: dict) -> str | None:
    return next((name for name in ANSWERS if _is_answer(row.get(name)) or (name == ANSWERS[0] and name in row)), None)


def _is_answer(value: object) -> bool:
    texts = isinstance(value, list) and bool(value) and all(isinstance(step, str) for step in value)
    return isinstance(value, str) or texts or fields.is_messages(value)


def _conversation(row: dict) -> str | None:
    return next((name for name in CONVERSATIONS if fields.is_messages(row.get(name))), None)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completion, label}``, its like, or the columns that ``--data.input_key`` and its like name."""
    label_name = _label_name(row, flags) or flags.label_key or LABELS[0]
    if flags.input_key:
        prompt, answer = _by_keys(row, where, flags, flags.input_key, label_name)
    elif (name := _answer_name(row)) is None and (whole := _conversation(row)) is not None:
        prompt, answer = _split(row, whole, where, flags)
    else:
        answer = read_answer(row, name or ANSWERS[0], where)
        prompt = needed_prompt(row, answer, flags, where)
    answer_label = fields.label(fields.column(row, label_name, where), label_name, where)
    return [make_record(row, where, join(prompt, answer, flags, where), step_labels=None, answer_label=answer_label)]


def _by_keys(row: dict, where: str, flags: DataConfig, input_key: str, label_key: str) -> tuple:
    """Without ``--data.output_key``, the input is a whole conversation."""
    for name, key in (("input", input_key), ("output", flags.output_key), ("label", label_key)):
        if key is not None and key not in row:
            fields.refuse(where, f"no column {key!r}, which --data.{name}_key names", f"it has {', '.join(row)}")
    if not flags.output_key:
        return _split(row, input_key, where, flags)
    given = to_prompt(fields.column(row, input_key, where), input_key, flags, where)
    prompt = complete_prompt(row, input_key, given, flags, where)
    return prompt, read_answer(row, flags.output_key, where)


def _split(row: dict, name: str, where: str, flags: DataConfig) -> tuple[str | list[dict], Answer]:
    """Prompt and answer of a whole conversation, whose last message is the answer."""
    given = fields.column(row, name, where)
    if not isinstance(given, list) or len(given) < 2:
        problem = f"{name!r} is no conversation of two messages or more"
        fields.refuse(where, problem, "give --data.output_key for the answer")
    answer = to_answer(given[-1:], f"{name}[{len(given) - 1}]", where)
    return complete_prompt(row, name, to_prompt(given[:-1], name, flags, where), flags, where), answer
