"""ms-swift's pairs: a conversation that ends with the better answer, and the worse one beside it."""

from dataclasses import replace

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.layouts import paired
from pipa_openrlhf.data.layouts.conversation import Answer, read_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.layouts.prompts import ADD_THE_FLAG
from pipa_openrlhf.data.record import Record

COLUMNS = ("messages", "rejected_response or rejected_messages")
READING = "`messages` end with the better answer; `rejected_response` is the worse, or ends `rejected_messages`"
EXAMPLE = {
    "messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
    "rejected_response": "3",
}
WORSE = ("rejected_response", "rejected_messages")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether a whole conversation stands beside a worse answer, and no better one does."""
    messages = row.get("messages")
    whole = isinstance(messages, list) and bool(messages) and _role(messages[-1]) == "assistant"
    return whole and any(name in row for name in WORSE) and not paired.fits(row, flags)


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{messages, rejected_response}`` (text, or messages after the user's last) or ``rejected_messages``."""
    chosen = read_answer(row, "messages", where)
    if chosen.messages is None or not flags.apply_chat_template:
        fields.refuse(where, "'messages' holds messages", ADD_THE_FLAG)
    name = next((name for name in WORSE if row.get(name) is not None), WORSE[0])
    rejected = read_answer(row, name, where)
    if rejected.messages is not None and rejected.messages[0]["role"] != "assistant":
        return pair_records(row, where, index, flags, None, chosen, rejected)
    count = _prompt_length(chosen.messages, rejected)
    if not count:
        fields.refuse(where, "'messages' has nothing before its answer", "start it with the user's message")
    answer = replace(chosen, messages=chosen.messages[count:])
    return pair_records(row, where, index, flags, chosen.messages[:count], answer, rejected)


def _prompt_length(messages: list[dict], rejected: Answer) -> int:
    """A text takes the place of the last message, messages that of all after the user's last."""
    if rejected.messages is None:
        return len(messages) - 1
    return max((number for number, one in enumerate(messages, start=1) if one["role"] == "user"), default=0)
