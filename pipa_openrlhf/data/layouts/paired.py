"""Pairs: a better and a worse answer to one prompt, whole or in steps."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.calls import chat_messages
from pipa_openrlhf.data.layouts.conversation import Answer, read_answer, to_answer
from pipa_openrlhf.data.layouts.pairs import is_whole, pair_records
from pipa_openrlhf.data.layouts.prompts import CONVERSATIONS, complete_prompt, prompt_column, read_prompt, to_prompt
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.errors import UserError

COLUMNS = ("chosen", "rejected")
READING = (
    "a better and a worse answer; without a prompt column the prompt is what both begin with. Also `chosen_response` "
    "/ `rejected_response`, `preferred_output` / `non_preferred_output`, `response` / `rejected_response`, "
    "`response_j` / `response_k`, `messages` that end with the better answer beside `rejected_response`"
)
EXAMPLE = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}

SIDES = (
    COLUMNS,
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
    ("response_j", "response_k"),
)
# The better answer is the last of the messages.
REJECTED_ALONE = ("rejected_response", "rejected_messages")
# What a column that says which side is better may be called, or have in its name.
_COMPARES = ("label", "labels")
_COMPARES_IN = ("prefer", "better", "safer", "winner", "choice")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has this layout's columns; Step-DPO's rows have them and more."""
    if "initial_reason_steps" in row or "full_chosen" in row or "original_chosen" in row:
        return False
    return _sides(row, flags) is not None or _rejected_alone(row, flags) is not None


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """The flags as they are.

    Raises:
        UserError: the key flags name the sides while another column says which of them is better.
    """
    names = (flags.chosen_key, flags.rejected_key)
    if names != COLUMNS and flags.format == "auto":
        compares = next((name for row in rows for name in row if _compares(row, name, flags)), None)
        if compares:
            raise UserError(
                f"{dataset}: {compares!r} may say which of {names[0]!r} and {names[1]!r} is better, row by row; "
                "leave the key flags out if it does, or give --data.format paired"
            )
    return flags


def _compares(row: dict, name: str, flags: DataConfig) -> bool:
    """Whether a column may say which side is better: key flags would turn round the labels of some rows."""
    if row[name] is None or name in (flags.chosen_key, flags.rejected_key, prompt_column(row, flags)):
        return False
    return name.lower() in _COMPARES or any(word in name.lower() for word in _COMPARES_IN)


def _sides(row: dict, flags: DataConfig) -> tuple[str, str] | None:
    named = (flags.chosen_key, flags.rejected_key)
    present = [two for two in (SIDES if named == COLUMNS else (named,)) if two[0] in row and two[1] in row]
    filled = (two for two in present if row[two[0]] is not None and row[two[1]] is not None)
    return next(filled, present[0] if present else None)


def _rejected_alone(row: dict, flags: DataConfig) -> str | None:
    if (flags.chosen_key, flags.rejected_key) != COLUMNS or not fields.is_messages(row.get("messages")):
        return None
    return next((name for name in REJECTED_ALONE if row.get(name) is not None), None)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{prompt, chosen, rejected}``, with steps also ``rejected_labels`` (and ``chosen_labels``, default all 1)."""
    sides = _sides(row, flags)
    alone = _rejected_alone(row, flags) if sides is None else None
    prompt: str | list[dict] | None
    if alone is not None:
        messages = chat_messages(row["messages"], "messages", where)
        chosen, rejected = to_answer(messages[-1:], "messages", where), _rejected(row, alone, where)
        prompt = complete_prompt(row, "messages", to_prompt(messages[:-1], "messages", flags, where), flags, where)
    else:
        chosen, rejected = (read_answer(row, name, where) for name in sides or (flags.chosen_key, flags.rejected_key))
        prompt = _read_prompt(row, chosen, rejected, flags, where)
    chosen_labels = _optional_labels(row, "chosen_labels", chosen, flags, where)
    rejected_labels = _optional_labels(row, "rejected_labels", rejected, flags, where)
    if chosen_labels is rejected_labels is None and (len(chosen.steps) > 1) != (len(rejected.steps) > 1):
        problem = "one side is a list of several texts and the other is one text"
        fields.refuse(where, problem, "give one answer a side, or label the steps by 'rejected_labels'")
    if chosen_labels is None and rejected_labels is not None:
        chosen_labels = [1] * len(chosen.steps)
    return pair_records(
        row,
        where,
        index,
        flags,
        prompt,
        chosen,
        rejected,
        chosen_labels=chosen_labels,
        rejected_labels=rejected_labels,
    )


def _read_prompt(
    row: dict, chosen: Answer, rejected: Answer, flags: DataConfig, where: str
) -> str | list[dict] | None:
    """The prompt; OpenAI's stands in ``input.messages``."""
    name = prompt_column(row, flags)
    value = None if name is None else row.get(name)
    if isinstance(value, dict) and "messages" in value:
        if value.get("tools"):
            fields.refuse(where, f"'{name}.tools' is not empty, and tools are not read", "remove the row")
        given = to_prompt(value["messages"], f"{name}.messages", flags, where)
        return complete_prompt(row, str(name), given, flags, where)
    if name in CONVERSATIONS and not flags.prompt_key and is_whole(chosen) and is_whole(rejected):
        return None  # the sides have the prompt; such a column often holds the whole better conversation
    prompt = read_prompt(row, flags, where)
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    said = (last.get("content") or "").strip() if last.get("role") == "assistant" else None
    if name in CONVERSATIONS and said in (chosen.steps[-1].strip(), rejected.steps[-1].strip()):
        fields.refuse(where, f"{name!r} ends with one of the answers", "name a prompt without it by --data.prompt_key")
    return prompt


def _rejected(row: dict, name: str, where: str) -> Answer:
    """The other answer, alone or at the end of the whole conversation."""
    answer = read_answer(row, name, where)
    return answer if answer.messages is None else to_answer(answer.messages[-1:], name, where)


def _optional_labels(row: dict, name: str, answer: Answer, flags: DataConfig, where: str) -> list[int | None] | None:
    value = row.get(name)
    if value is None:
        return None
    return fields.labels(value, name, len(answer.steps), where, flags.step_threshold, flags.neutral_step)
