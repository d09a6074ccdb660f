"""Where the prompt ends and the answer begins, for text and for chat messages."""

import json
from dataclasses import dataclass

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data import fields
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.render import fill_template

ADD_THE_FLAG = "add --data.apply_chat_template, or give text"


@dataclass(frozen=True)
class Answer:
    """What an answer column holds: step texts (one for plain text), or chat messages."""

    name: str
    steps: list[str]
    messages: list[dict] | None = None


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answer as a Record has them; ``identity`` is the default problem_id."""

    prompt: str | list[dict]
    answer: Answer
    identity: str


def read_answer(row: dict, name: str, where: str) -> Answer:
    """Text, a list of strings (steps) or a list of messages."""
    value = fields.column(row, name, where)
    if fields.is_messages(value):
        messages = fields.messages(value, name, where)
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


def read_prompt(row: dict, flags: DataConfig, where: str) -> str | list[dict] | None:
    """The prompt column; None where the data has none and the user named none."""
    name = flags.prompt_key or "prompt"
    if name not in row and not flags.prompt_key:
        return None
    value = fields.column(row, name, where)
    if fields.is_messages(value):
        if not flags.apply_chat_template:
            fields.refuse(where, f"{name!r} holds messages", ADD_THE_FLAG)
        return fields.messages(value, name, where)
    if not isinstance(value, str):
        fields.refuse(where, f"{name!r} is {fields.show(value)}", "a prompt is text or a list of messages")
    return fields.text(value, name, where, may_be_empty=True)


def join(prompt: str | list[dict] | None, answer: Answer, flags: DataConfig, where: str) -> Conversation:
    """Prompt and answer as the model will see them, before the chat template.

    Without a prompt column, messages are split as OpenRLHF does (the prompt is all but the last one); text has the
    prompt "" as in OpenRLHF, and each such row is a problem of its own.
    """
    if flags.apply_chat_template:
        return _join_chat(prompt, answer, where)
    if answer.messages is not None:
        fields.refuse(where, f"{answer.name!r} holds messages", ADD_THE_FLAG)
    if isinstance(prompt, str):
        return Conversation(fill_template(prompt, flags.input_template), answer, identity=prompt)
    return Conversation("", answer, identity=where)


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
        repeated = answer.messages[: len(as_messages)] == as_messages and len(answer.messages) > len(as_messages)
        rest = answer.messages[len(as_messages) :] if repeated else answer.messages
        return Conversation(as_messages, Answer(answer.name, answer.steps, rest), identity)
    if len(answer.messages) == 1:
        fields.refuse(where, f"{answer.name!r} has no prompt", "start it with the user's message or add 'prompt'")
    head, last = answer.messages[:-1], answer.messages[-1:]
    return Conversation(head, Answer(answer.name, answer.steps, last), canonical_json(head))


def join_rejected(
    prompt: str | list[dict] | None, rejected: Answer, chosen: Conversation, flags: DataConfig, where: str
) -> Conversation:
    """The rejected side: without messages in the prompt column, its prompt is the chosen side's, as in OpenRLHF."""
    messages = rejected.messages
    if (
        messages is None
        or messages[0]["role"] == "assistant"
        or not flags.apply_chat_template
        or isinstance(prompt, list)
    ):
        return join(prompt, rejected, flags, where)
    head, rest = messages[: len(chosen.prompt)], messages[len(chosen.prompt) :]
    if head != chosen.prompt or not rest:
        problem = f"{rejected.name!r} does not start with the prompt of {chosen.answer.name!r}"
        fields.refuse(where, problem, "make their messages before the answer the same")
    return Conversation(chosen.prompt, Answer(rejected.name, rejected.steps, rest), chosen.identity)


def canonical_json(messages: list[dict]) -> str:
    """One spelling of a message list, to tell problems apart by."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def needed_prompt(row: dict, answer: Answer, flags: DataConfig, where: str) -> str | list[dict] | None:
    """The prompt; only pairs, and messages that hold the whole conversation, may do without a prompt column."""
    prompt = read_prompt(row, flags, where)
    if prompt is None and answer.messages is None:
        fields.column(row, "prompt", where)
    return prompt


def make_record(
    row: dict,
    where: str,
    conversation: Conversation,
    step_labels: list[int] | None,
    answer_label: int,
    label_source: str,
    **more,
) -> Record:
    """A record of one answer, whose problem is the row's ``problem_id`` or else its prompt."""
    return Record(
        prompt=conversation.prompt,
        steps=conversation.answer.steps,
        step_labels=step_labels,
        answer_label=answer_label,
        label_source=label_source,
        problem_id=_problem_id(row, conversation.identity, where),
        where=where,
        messages=conversation.answer.messages,
        **more,
    )


def _problem_id(row: dict, default: str, where: str) -> str:
    value = row.get("problem_id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        fields.refuse(where, f"'problem_id' is {fields.show(value)}", "give text or a whole number")
    return str(value)
