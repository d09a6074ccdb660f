"""Where the prompt ends and the answer begins, for text and for chat messages."""

import json
from dataclasses import dataclass

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.input_template import fill_template, template_spans
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.calls import chat_messages
from pipa_openrlhf.data.layouts.prompts import ADD_THE_FLAG, read_prompt
from pipa_openrlhf.data.record import Record


@dataclass(frozen=True)
class Answer:
    """What an answer column holds: step texts (one for plain text), or chat messages.

    Attributes:
        masked: ``(step, start, end)`` of what others than the model say in the text.
    """

    name: str
    steps: list[str]
    messages: list[dict] | None = None
    masked: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answer as a Record has them; ``identity`` is the default problem_id."""

    prompt: str | list[dict]
    answer: Answer
    identity: str
    own_spans: tuple[tuple[int, int], ...] = ()


def read_answer(row: dict, name: str, where: str) -> Answer:
    """The column's text, list of strings (steps), message, or list of messages."""
    return to_answer(fields.column(row, name, where), name, where)


def to_answer(value: object, name: str, where: str) -> Answer:
    """A value as an answer; ``name`` says in messages where it stood."""
    if fields.is_messages(value):
        messages = chat_messages(value, name, where)
        last = messages[-1]
        if last["role"] != "assistant":
            fields.refuse(where, f"{name!r} ends with a {last['role']} message", "end with the assistant's")
        if not last.get("tool_calls"):
            fields.text(last["content"], f"{name}[{len(messages) - 1}].content", where)
        return Answer(name, [last["content"] or ""], messages)
    if isinstance(value, list):
        return Answer(name, fields.steps(value, name, where))
    if not isinstance(value, str):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "give text, a list of steps, or messages")
    return Answer(name, [fields.text(value, name, where)])


def join(
    prompt: str | list[dict] | None, answer: Answer, flags: DataConfig, where: str, prefix: str = ""
) -> Conversation:
    """Prompt and answer as the model will see them, before the chat template.

    Without a prompt column, messages are split as OpenRLHF does (the prompt is all but the last one); text has the
    prompt "" as in OpenRLHF. Each row with an empty prompt is a problem of its own.

    Args:
        prefix: the answer's beginning, which is given to the model as part of the prompt.
    """
    if flags.apply_chat_template:
        conversation = _join_chat(prompt, answer, where)
        if not prefix:
            return conversation
        begun = [*conversation.prompt, {"role": "assistant", "content": prefix}]
        return Conversation(begun, conversation.answer, conversation.identity)
    if answer.messages is not None:
        fields.refuse(where, f"{answer.name!r} holds messages", ADD_THE_FLAG)
    if isinstance(prompt, str):
        filled = fill_template(prompt, flags.input_template) + prefix
        return Conversation(filled, answer, prompt or where, template_spans(prompt, flags.input_template))
    return Conversation(prefix, answer, identity=where)


def _join_chat(prompt: str | list[dict] | None, answer: Answer, where: str) -> Conversation:
    identity = prompt if isinstance(prompt, str) else canonical_json(prompt or [])
    as_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else (prompt or [])
    if answer.messages is None:
        if prompt is None:
            remedy = "add a 'prompt' column or give the answer as messages"
            fields.refuse(where, "--data.apply_chat_template needs a prompt", remedy)
        return Conversation(as_messages, answer, identity)

    starts_with_answer = answer.messages[0]["role"] == "assistant"
    if isinstance(prompt, list) or (prompt is not None and starts_with_answer):
        # Some data repeat the prompt at the head of the answer; rendering it twice would be wrong.
        rest = answer.messages[_repeated(as_messages, answer.messages) :]
        return Conversation(as_messages, Answer(answer.name, answer.steps, rest), identity)
    if len(answer.messages) == 1:
        fields.refuse(where, f"{answer.name!r} has no prompt", "start it with the user's message or add 'prompt'")
    head, last = answer.messages[:-1], answer.messages[-1:]
    return Conversation(head, Answer(answer.name, answer.steps, last), canonical_json(head))


def _repeated(prompt: list[dict], answer: list[dict]) -> int:
    """How many messages at the head of a whole conversation are the prompt's last ones (its system text may stand in a
    column of its own)."""
    if answer[0]["role"] == "assistant":
        return len(prompt) if answer[: len(prompt)] == prompt and len(answer) > len(prompt) else 0
    most = min(len(prompt), len(answer) - 1)
    return next((count for count in range(most, 0, -1) if answer[:count] == prompt[-count:]), 0)


def canonical_json(messages: list[dict]) -> str:
    """One spelling of a message list, to tell problems apart by."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def needed_prompt(row: dict, answer: Answer, flags: DataConfig, where: str) -> str | list[dict] | None:
    """The prompt; only pairs, and messages that hold the whole conversation, may do without a prompt column."""
    prompt = read_prompt(row, flags, where)
    if prompt is None and answer.messages is None:
        fields.column(row, "prompt", where)
    return prompt


def make_record(row: dict, where: str, conversation: Conversation, **labels) -> Record:
    """A record of one answer, whose problem is the row's ``problem_id`` or else its prompt.

    Args:
        labels: the other attributes of :class:`Record`: ``step_labels``, ``answer_label``, ``label_source``, ...
    """
    return Record(
        prompt=conversation.prompt,
        steps=conversation.answer.steps,
        problem_id=_problem_id(row, conversation.identity, where),
        where=where,
        messages=conversation.answer.messages,
        own_spans=conversation.own_spans,
        weight=fields.weight(row, where),
        **labels,
    )


def _problem_id(row: dict, default: str, where: str) -> str:
    value = row.get("problem_id")
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        fields.refuse(where, f"'problem_id' is {fields.show(value)}", "give text or a whole number")
    return fields.text(str(value), "problem_id", where)
