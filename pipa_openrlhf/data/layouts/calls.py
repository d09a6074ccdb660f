"""Chat messages in which ShareGPT's function calls are tool calls, as chat templates know them."""

import json

from pipa_openrlhf.data.layouts import fields

CALL = "function_call"


def chat_messages(value: list | dict, name: str, where: str) -> list[dict]:
    """As :func:`fields.messages`, with the turns whose role is ``function_call`` as the assistant's tool calls.

    Raises:
        UserError: as there, or such a turn is no call.
    """
    messages = fields.messages(value, name, where)
    return [_as_call(one, f"{name}[{number}]", where) for number, one in enumerate(messages)]


def _as_call(message: dict, place: str, where: str) -> dict:
    if message["role"] != CALL:
        return message
    try:
        value = json.loads(message["content"] or "")
    except ValueError:
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
        remedy = "give a JSON object with 'name' and 'arguments', or a list of such"
        fields.refuse(where, f"{place!r} is no function call, it is {fields.show(message['content'])}", remedy)
    wrapped = [{"type": "function", "function": one} for one in calls]
    return {**message, "role": "assistant", "content": None, "tool_calls": wrapped}
