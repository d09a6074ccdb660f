"""Pairs: a better and a worse answer to one prompt, whole or in steps."""

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, read_answer, to_answer
from pipa_openrlhf.data.layouts.dialogue import style_of
from pipa_openrlhf.data.layouts.pairs import is_whole, pair_records
from pipa_openrlhf.data.layouts.prompts import CONVERSATIONS, complete_prompt, prompt_column, read_prompt, to_prompt
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.errors import UserError

COLUMNS = ("chosen", "rejected")
READING = (
    "a better and a worse answer; without a prompt column the prompt is what both begin with, and what others say "
    "after that is outside every loss. Also `chosen_response` / `rejected_response`, `preferred_output` / "
    "`non_preferred_output`, `response` / `rejected_response`, `response_j` / `response_k`, `messages` that end with "
    "the better answer beside `rejected_response`"
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
LONG_PROMPT = 16  # characters; two answers that begin with so much of the prompt rarely do by chance
# What is in the name of a column that says which side is better.
_COMPARES = ("prefer", "better", "winner", "choice")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether the row has this layout's columns; Step-DPO's rows have them and more."""
    if "initial_reason_steps" in row or "full_chosen" in row or "original_chosen" in row:
        return False
    return sides(row, flags) is not None or _rejected_alone(row, flags) is not None


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """The flags as they are.

    Raises:
        UserError: the key flags name the sides while another column says which of them is better; or the answers of
            every row begin with their prompt. One row's may.
    """
    if flags.format == "auto" and all(_repeats_prompt(row, flags) for row in rows):
        raise UserError(
            f"{dataset}: all answers begin with the text of their prompt; remove it from them, leave out the prompt's "
            "column, or give --data.format paired if they say it again"
        )
    names = (flags.chosen_key, flags.rejected_key)
    if names != COLUMNS and flags.format == "auto":
        others = (name for row in rows for name in row if row[name] is not None and _compares(name))
        name = next((name for name in others if name not in (*names, flags.prompt_key)), None)
        if name is not None:
            raise UserError(
                f"{dataset}: --data.chosen_key {names[0]} and --data.rejected_key {names[1]} say which side is "
                f"better, but so may {name!r}, row by row; leave these flags out if it does, or give --data.format "
                "paired"
            )
    return flags


def _repeats_prompt(row: dict, flags: DataConfig) -> bool:
    """Whether both sides begin with a prompt that is no dialogue, which reading takes off."""
    prompt = row.get(prompt_column(row, flags) or "")
    if not isinstance(prompt, str) or len(prompt) < LONG_PROMPT or style_of(prompt) is not None:
        return False
    texts = [row[name] for name in sides(row, flags) or ()]
    return bool(texts) and all(isinstance(text, str) and text.startswith(prompt) for text in texts)


def _compares(name: str) -> bool:
    return name in ("label", "labels") or any(word in name.lower() for word in _COMPARES)


def sides(row: dict, flags: DataConfig) -> tuple[str, str] | None:
    """Columns of the better and the worse side: the flags', where the user gave them, else the first with values."""
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
    names = sides(row, flags)
    alone = _rejected_alone(row, flags) if names is None else None
    prompt: str | list[dict] | None
    if alone is not None:
        prompt, chosen, rejected = _read_conversation(row, alone, flags, where)
    else:
        chosen, rejected = (read_answer(row, name, where) for name in names or (flags.chosen_key, flags.rejected_key))
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
    if is_whole(chosen) and is_whole(rejected) and flags.apply_chat_template:
        # The sides have the prompt; a column of messages often holds the whole better conversation.
        if isinstance(value, str) or (name in CONVERSATIONS and not flags.prompt_key):
            return None
    prompt = read_prompt(row, flags, where)
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    said = (last.get("content") or "").strip() if last.get("role") == "assistant" else None
    if name in CONVERSATIONS and said in (chosen.steps[-1].strip(), rejected.steps[-1].strip()):
        fields.refuse(where, f"{name!r} ends with one of the answers", "name a prompt without it by --data.prompt_key")
    return prompt


def _read_conversation(
    row: dict, name: str, flags: DataConfig, where: str
) -> tuple[str | list[dict] | None, Answer, Answer]:
    """ms-swift's ``messages`` and the other answer: a text for the last of them, messages for all after the user's
    last, or a whole conversation."""
    chosen, rejected = read_answer(row, "messages", where), read_answer(row, name, where)
    messages = chosen.messages or []
    if is_whole(rejected):
        return None, chosen, rejected
    count = len(messages) - 1
    if rejected.messages is not None:
        count = max((number for number, one in enumerate(messages, start=1) if one["role"] == "user"), default=0)
    if not count:
        fields.refuse(where, "'messages' has nothing before its answer", "start it with the user's message")
    prompt = complete_prompt(row, "messages", to_prompt(messages[:count], "messages", flags, where), flags, where)
    return prompt, to_answer(messages[count:], "messages", where), rejected


def _optional_labels(row: dict, name: str, answer: Answer, flags: DataConfig, where: str) -> list[int | None] | None:
    value = row.get(name)
    if value is None:
        return None
    return fields.labels(value, name, len(answer.steps), where, flags.step_threshold, flags.neutral_step)
