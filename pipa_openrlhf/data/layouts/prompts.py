"""Which columns make the prompt, and what each of them says."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.calls import chat_messages

CONVERSATIONS = ("messages", "conversations", "conversation")
# In the order in which a row's columns are tried.
NAMES = (
    *("prompt", "question", "instruction", "problem", "query", "trajectory", "context"),
    "input",
    *CONVERSATIONS,
)
SYSTEM = ("system", "system_prompt")
ADD_THE_FLAG = "add --data.apply_chat_template, or give text"


def prompt_column(row: dict, flags: DataConfig) -> str | None:
    """Name of the column that holds the prompt; None where the data has none and the user named none."""
    if flags.prompt_key:
        return flags.prompt_key
    return next((name for name in NAMES if name in row and row[name] is not None), None)


def read_prompt(row: dict, flags: DataConfig, where: str) -> str | list[dict] | None:
    """The prompt as text or messages, with the row's system text, earlier turns and further input; None: no column.

    Raises:
        UserError: a named column is missing, or holds something else.
    """
    name = prompt_column(row, flags)
    if name is None:
        return None
    return complete_prompt(row, name, to_prompt(fields.column(row, name, where), name, flags, where), flags, where)


def to_prompt(value: object, name: str, flags: DataConfig, where: str) -> str | list[dict]:
    """A value as text or messages."""
    if fields.is_messages(value):
        if not flags.apply_chat_template:
            fields.refuse(where, f"{name!r} holds messages", ADD_THE_FLAG)
        return chat_messages(value, name, where)
    if not isinstance(value, str):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a prompt is text or a list of messages")
    return fields.text(value, name, where, may_be_empty=True)


def complete_prompt(row: dict, name: str, prompt: str | list[dict], flags: DataConfig, where: str) -> str | list[dict]:
    """The prompt of column ``name`` with what stands beside it: ``input``, ``system`` and ``history``."""
    more = fields.optional_text(row, "input", where) if name != "input" and isinstance(prompt, str) else ""
    if more and isinstance(prompt, str):
        prompt = f"{prompt}\n{more}"
    before = _turns_before(row, where)
    if not before:
        return prompt
    if flags.apply_chat_template:
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return own if own[: len(before)] == before else before + own
    if not isinstance(prompt, str):
        return prompt
    return "\n\n".join([message["content"] for message in before] + [prompt])


def add_system(row: dict, prompt: str | list[dict], where: str) -> str | list[dict]:
    """The prompt that whole conversations begin with, which has its earlier turns, with the row's system text.

    Nothing goes before an empty prompt: it would no longer be seen that there is none.
    """
    system = _system(row, where)
    if not system or not prompt:
        return prompt
    if isinstance(prompt, str):
        return "\n\n".join([system, prompt.removeprefix("\n\n")])
    return prompt if prompt[0]["role"] == "system" else [{"role": "system", "content": system}, *prompt]


def _system(row: dict, where: str) -> str:
    return next((text for name in SYSTEM if (text := fields.optional_text(row, name, where))), "")


def _turns_before(row: dict, where: str) -> list[dict]:
    """Messages of the system text and of ``history``, a list of [question, answer]."""
    system = _system(row, where)
    before = [{"role": "system", "content": system}] if system else []
    turns = row.get("history")
    if turns and not isinstance(turns, list):
        fields.refuse(where, f"'history' is {fields.show(turns)}", "give a list of [question, answer]")
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        place = f"history[{number}]"
        if not isinstance(turn, list) or len(turn) != 2:
            fields.refuse(where, f"{place!r} is {fields.show(turn)}", "give [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            before.append({"role": role, "content": fields.text(text, place, where)})
    return before
