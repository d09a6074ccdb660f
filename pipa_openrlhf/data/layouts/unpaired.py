"""Single answers, each right or wrong: the data of KTO and of OREO, rollouts with a reward."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields, first_error, resampled, sign_turns, tagged
from pipa_openrlhf.data.layouts.answer_columns import answer_columns, label_columns, one_label
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, needed_prompt, read_answer, to_answer
from pipa_openrlhf.data.layouts.prompts import CONVERSATIONS, complete_prompt, prompt_column, to_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("completion", "label")
READING = (
    "one answer, right or wrong; the answer is `completion`, `response`, `output`, ... or the last of `messages`; the "
    "label is `label`, `is_correct`, `kto_tag`, ..., or `score` or `reward` where they are 1 or 0"
)
EXAMPLE = {"prompt": "1+1=", "completion": "2", "label": True}


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has an answer and a label, or the user named them, and they are not those of steps."""
    if flags.input_key:
        return not tagged.fits(row, flags)
    if (flags.chosen_key in row and flags.rejected_key in row) or isinstance(row.get("steps"), list):
        return False
    labelled = flags.label_key in row if flags.label_key else bool(label_columns(row))
    answered = bool(answer_columns(row)) or _conversation(row) is not None
    others = (tagged, first_error, sign_turns, resampled)
    return labelled and answered and not any(one.fits(row, flags) for one in others)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, completion, label}``, or the columns that ``--data.input_key`` and its like name."""
    if flags.input_key:
        return [_by_keys(row, where, flags, flags.input_key, flags.label_key or "label")]
    names = answer_columns(row)
    if len(names) > 1:
        problem = f"{' and '.join(map(repr, names))} may both be the answer"
        fields.refuse(where, problem, "name the columns by --data.input_key and --data.output_key")
    name = names[0] if names else _conversation(row)
    label = _label(row, flags, where)
    if name == "responses" and isinstance(row[name], list) and len(row[name]) > 1:
        fields.refuse(where, f"one label for {len(row[name])} 'responses'", "give a list with one label each")
    if name is None:
        name = COLUMNS[0]  # that it is missing, null or something else is said below
    answer = read_answer(row, name, where)
    if _is_whole(row, name, answer, flags):
        return [_whole(row, name, answer, label, flags, where)]
    conversation = join(needed_prompt(row, answer, flags, where), answer, flags, where)
    if prompt_column(row, flags) in CONVERSATIONS:
        _check_no_answer_in(conversation.prompt, answer, where)
    return [make_record(row, where, conversation, step_labels=None, answer_label=label)]


def _conversation(row: dict) -> str | None:
    return next((name for name in CONVERSATIONS if fields.is_messages(row.get(name))), None)


def _label(row: dict, flags: DataConfig, where: str) -> int:
    if flags.label_key:
        return fields.label(fields.column(row, flags.label_key, where), flags.label_key, where)
    return one_label(row, "", where)


def _is_whole(row: dict, name: str, answer: Answer, flags: DataConfig) -> bool:
    """Whether the answer's column has the prompt too, though a text of it may stand in another."""
    if name in CONVERSATIONS:
        return True
    prompt = prompt_column(row, flags)
    begins = answer.messages is not None and answer.messages[0]["role"] != "assistant"
    return begins and (prompt is None or isinstance(row.get(prompt), str))


def _whole(row: dict, name: str, answer: Answer, label: int, flags: DataConfig, where: str) -> Record:
    messages = answer.messages or []
    if len(messages) < 2:
        fields.refuse(where, f"{name!r} has no prompt", "start it with the user's message or add 'prompt'")
    prompt = complete_prompt(row, name, to_prompt(messages[:-1], name, flags, where), flags, where)
    conversation = join(prompt, Answer(name, answer.steps, messages[-1:]), flags, where)
    return make_record(row, where, conversation, step_labels=None, answer_label=label)


def _check_no_answer_in(prompt: str | list[dict], answer: Answer, where: str) -> None:
    """Some data have the whole conversation beside the answer."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    if last.get("role") == "assistant" and (last.get("content") or "").strip() == answer.steps[-1].strip():
        problem = f"the prompt ends with the answer, {answer.name!r}"
        fields.refuse(where, problem, "name a prompt without it by --data.prompt_key")


def _by_keys(row: dict, where: str, flags: DataConfig, input_key: str, label_key: str) -> Record:
    """Without ``--data.output_key``, the input is a whole conversation, whose last message is the answer."""
    for name, key in (("input", input_key), ("output", flags.output_key), ("label", label_key)):
        if key is not None and key not in row:
            fields.refuse(
                where, f"no column {key!r}, which --data.{name}_key names", f"it has {fields.column_names(row)}"
            )
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
