"""A record as text, plain or through a chat template: the prompt, and the pieces of the answer that share no token."""

import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pipa_openrlhf.data.record import Record, Unusable
from pipa_openrlhf.data.special_text import special_text
from pipa_openrlhf.errors import UserError, first_line

_TEMPLATE_FLAG = "--data.tokenizer_chat_template"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "What is 6 times 7?"

_Spans = list[tuple[int, int]]


def use_chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Give the tokenizer the template of ``--data.tokenizer_chat_template``, where there is one, and try it.

    Args:
        given: path of a file, or a template. The tokenizer keeps it, so that it is saved with the model.

    Raises:
        UserError: no such file, no template at all, or one that does not write a user's message.
    """
    if given:
        tokenizer.chat_template = _read_template(given)
    if not tokenizer.chat_template:
        raise UserError(f"--data.apply_chat_template: the tokenizer has none; give {_TEMPLATE_FLAG}")
    origin = f"{_TEMPLATE_FLAG} {_shown(given)}" if given else "the tokenizer's chat template"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PROBE}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it may raise anything
        if type(error) is TemplateError:
            return  # its own raise_exception: it may take other conversations
        raise UserError(f"{origin}: cannot be used ({first_line(error)}); correct the template") from error
    if _PROBE not in text:
        raise UserError(f"{origin}: it does not write the message that it is given; correct it, or check the path")


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> str:
    """The text of messages, shielded where they are.

    Args:
        options: ``add_generation_prompt`` or ``continue_final_message``.

    Raises:
        Unusable: the template refuses the messages, or does not write what they say of special tokens as text.
    """

    def write(given: list[dict]) -> str:
        try:
            return cast(str, tokenizer.apply_chat_template(given, tokenize=False, **options))
        except Exception as error:  # a template is a program: it may raise anything about messages it does not know
            raise Unusable(f"the chat template refuses the messages: {first_line(error)}") from error

    text = write(messages)
    special = special_text(tokenizer)
    plain = special.unshield_all(messages)
    if plain != messages and special.unshield(text) != write(plain):
        raise Unusable(OBEYS)
    return text


def _apply_with_marks(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[str, _Spans | None]:
    """The text, and the characters that ``{% generation %}`` marks as the model's; None for a template without marks.

    Raises:
        Unusable: the template refuses the messages.
    """
    template = tokenizer.get_chat_template()
    if not _GENERATION.search(template):
        return apply_template(tokenizer, messages), None
    special_tokens: dict[str, Any] = {**tokenizer.special_tokens_map}
    try:
        rendered = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )
    except Exception as error:
        raise Unusable(f"the chat template refuses the messages: {first_line(error)}") from error
    if special_text(tokenizer).unshield_all(messages) != messages:
        apply_template(tokenizer, messages)  # checks what the template does with them
    texts, marks = cast(tuple[list[str], list[_Spans]], rendered)  # transformers declares a string
    return texts[0], marks[0]


def _read_template(given: str) -> str:
    if not os.path.isfile(given):
        if "{" not in given:
            raise UserError(f"{_TEMPLATE_FLAG} {_shown(given)}: no such file, and no Jinja template; check the path")
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{_TEMPLATE_FLAG} {given}: cannot be read ({first_line(error)}); give a UTF-8 text file"
        ) from error


def _shown(given: str) -> str:
    line = " ".join(given.split())
    return line if len(line) <= 60 else line[:57] + "..."


def fix_template_date(tokenizer: PreTrainedTokenizerBase, time: str) -> None:
    """Make every chat template that ``tokenizer`` applies believe that it is ``time``.

    Args:
        tokenizer: changed in place; what it saves stays as it is.
        time: ISO format.
    """
    # transformers hands keyword arguments to the template, where they go before its own functions.
    tokenizer.apply_chat_template = partial(  # type: ignore[method-assign]  # of this one tokenizer only
        tokenizer.apply_chat_template, strftime_now=datetime.fromisoformat(time).strftime
    )


class Piece(NamedTuple):
    """A stretch of the answer's text within one step; ``masked`` text plays no part in any loss."""

    text: str
    step: int
    masked: bool


@dataclass(frozen=True)
class Rendered:
    """Text of a record. The eos that follows the last piece is not in it: it is added as a token."""

    prompt: str
    pieces: list[Piece]


def render(
    record: Record, tokenizer: PreTrainedTokenizerBase, step_separator: str, special_tokens: str = "text"
) -> Rendered:
    """The record's text, through the chat template where the prompt is messages; shielded, see ``special_text.py``.

    Args:
        special_tokens: ``--data.special_tokens``.

    Raises:
        Unusable: the chat template changes the prompt or the answer, or does not show what the model wrote.
    """
    eos, special = tokenizer.eos_token, special_text(tokenizer)
    if record.messages is None:
        # An answer that ends with the eos string has it as its eos, so it must not be written twice.
        steps = [*record.steps[:-1], record.steps[-1].removesuffix(eos)]
        messages = [{"role": "assistant", "content": step_separator.join(steps)}]
    else:
        steps, messages = record.steps, [_without_eos(message, eos) for message in record.messages]
    messages = special.shield_all(messages)
    starts = list(accumulate((len(step) + len(step_separator) for step in steps[:-1]), initial=0))
    if isinstance(record.prompt, str):
        is_own = special_tokens == "prompt"
        prompt = record.prompt if is_own else special.shield_outside(record.prompt, record.own_spans)
        return Rendered(prompt, _pieces(messages[0]["content"], starts, _tool_output(record, starts)))

    exact = len(steps) > 1 or bool(record.masked_spans) or not record.complete
    turns = render_turns(tokenizer, special.shield_all(record.prompt), messages, exact, record.complete)
    answer = turns.text[turns.prompt_len :]
    written = [(start - turns.prompt_len, end - turns.prompt_len) for start, end in turns.spans]
    starts = [turns.content_start - turns.prompt_len + start for start in starts]
    masked = _between(written, len(answer)) + _tool_output(record, starts)
    return Rendered(turns.text[: turns.prompt_len], _pieces(answer, starts, masked))


def _without_eos(message: dict, eos: str) -> dict:
    if message["role"] != "assistant" or message["content"] is None:
        return message
    return {**message, "content": message["content"].removesuffix(eos)}


def _tool_output(record: Record, starts: list[int]) -> _Spans:
    return [(starts[step] + start, starts[step] + end) for step, start, end in record.masked_spans]


def _between(spans: _Spans, length: int) -> _Spans:
    """What is outside of ``spans``, which are in order."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]


def _pieces(answer: str, starts: list[int], masked: _Spans) -> list[Piece]:
    """The answer cut where a step or masked text begins or ends; what comes before the content is the first step's."""
    edges = {0, len(answer), *starts[1:], *(edge for span in masked for edge in span)}
    cuts = sorted(edge for edge in edges if edge <= len(answer))
    return [
        Piece(
            answer[start:end],
            max(bisect_right(starts, start) - 1, 0),
            any(low <= start < high for low, high in masked),
        )
        for start, end in pairwise(cuts)
    ]


OBEYS = "the chat template does something else where a message holds the text of a special token"
REWRITES_PROMPT = "the chat template rewrites the prompt"
REWRITES_STEPS = "the chat template rewrites the steps"
LEAVES_OUT = "the chat template leaves out part of the answer"
NO_TURNS = "the chat template does not show where the assistant's turns begin and end"


@dataclass(frozen=True)
class Turns:
    """A rendered conversation, cut where the eos of its last message stood (that eos is added as a token).

    Attributes:
        prompt_len: characters of the prompt.
        spans: characters that the model wrote, in order: its turns with their ends, without headers and other roles.
        content_start: where the first assistant message's content begins.
    """

    text: str
    prompt_len: int
    spans: _Spans
    content_start: int


def render_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answer: list[dict], exact: bool, complete: bool = True
) -> Turns:
    """Prompt and answer through the chat template; an answer that follows an assistant's message continues it.

    Args:
        answer: ends with an assistant message.
        exact: contents must stand in the text as they are; otherwise surrounding whitespace may be missing.
        complete: False: the answer goes on, so that the text ends with its content.

    Raises:
        Unusable: the template refuses the messages, changes the prompt, leaves out part of the answer, or does not
            show what the model wrote.
    """
    eos = tokenizer.eos_token
    conversation, prompt_text = _join(tokenizer, prompt, answer)
    text, marks = _apply_with_marks(tokenizer, conversation)
    if not text.startswith(prompt_text):
        raise Unusable(REWRITES_PROMPT)
    first = len(conversation) - len(answer)
    turns = [index for index in range(first, len(conversation)) if conversation[index]["role"] == "assistant"]
    if marks is None:
        spans = [_turn(tokenizer, conversation, index, first, text, len(prompt_text)) for index in turns]
    else:
        spans = _merge_marks(marks, text, len(prompt_text), eos)

    edges = [len(prompt_text), *(edge for span in spans for edge in span), len(text)]
    of_others = "\0".join(text[start:end] for start, end in zip(edges[::2], edges[1::2]))
    others = [message["content"] for message in answer if message["role"] != "assistant"]
    if not all(_is_written(content, of_others) for content in others):
        raise Unusable(LEAVES_OUT)
    position, content_starts = len(prompt_text), []
    for number, index in enumerate(turns):
        own = spans if marks is not None else spans[number : number + 1]
        start, position = _find_message(answer[index - first], text, own, position, exact)
        content_starts.append(start)
    cut = text.rfind(eos, position) if complete else position
    cut = len(text) if cut < 0 else cut
    return Turns(text[:cut], len(prompt_text), spans, content_starts[0])


def _join(tokenizer, prompt: list[dict], answer: list[dict]) -> tuple[list[dict], str]:
    """The conversation, and the text of its prompt."""
    prompt, answer = _without_nulls(tokenizer, prompt, answer)
    last, following = prompt[-1], answer[0]
    by_assistant = following["role"] == "assistant"
    if last["role"] == "assistant" and by_assistant and last["content"] and following["content"] is not None:
        whole = {**last, **following, "content": last["content"] + following["content"]}
        return [*prompt[:-1], whole, *answer[1:]], apply_template(tokenizer, prompt, continue_final_message=True)
    return prompt + answer, apply_template(tokenizer, prompt, add_generation_prompt=by_assistant)


def _without_nulls(tokenizer, prompt: list[dict], answer: list[dict]) -> tuple[list[dict], list[dict]]:
    """Empty texts for null contents, where the template writes "None" for null or cannot take it."""
    given = prompt + answer
    if all(message["content"] is not None for message in given):
        return prompt, answer
    empty = [{**message, "content": message["content"] or ""} for message in given]
    try:
        written = [apply_template(tokenizer, messages) for messages in (given, empty)]
    except Unusable:
        written = None
    if written and written[0].count("None") == written[1].count("None"):
        return prompt, answer
    return empty[: len(prompt)], empty[len(prompt) :]


def _turn(tokenizer, conversation: list[dict], index: int, first: int, text: str, prompt_len: int) -> tuple[int, int]:
    """Where the assistant's message ``index`` begins, after its header, and ends, by rendering what comes before."""
    start = prompt_len
    if index > first:
        before = apply_template(tokenizer, conversation[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise Unusable(NO_TURNS)
        start = len(before)
    if index == len(conversation) - 1:
        return start, len(text)

    # Some templates put more before a last message than before the same message elsewhere; its end is the same.
    whole = apply_template(tokenizer, conversation[: index + 1]).rstrip()
    ends = (start + len(whole) - cut for cut in range(start, len(whole)) if text.startswith(whole[cut:], start))
    end = next(ends, None)
    if end is None or not whole.startswith(text[:start]):
        raise Unusable(NO_TURNS)
    eos = tokenizer.eos_token
    last_eos = text.rfind(eos, start, end)
    if last_eos >= 0:
        end = last_eos + len(eos)
    elif text.startswith(eos, end):
        end += len(eos)
    return start, end


def _merge_marks(marks: _Spans, text: str, prompt_len: int, eos: str) -> _Spans:
    """Marked text after the prompt; the eos right after a mark is the model's too."""
    spans: _Spans = []
    for start, end in sorted(marks):
        if text.startswith(eos, end):
            end += len(eos)
        if end <= prompt_len:
            continue
        start = max(start, prompt_len)
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    if not spans:
        raise Unusable(NO_TURNS)
    return spans


def _is_written(content: str | None, text: str) -> bool:
    """Whether a template wrote the content, as text or inside JSON."""
    content = (content or "").strip()
    forms = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
    return content in text or any(form in text for form in forms)


def _find_message(message: dict, text: str, spans: _Spans, position: int, exact: bool) -> tuple[int, int]:
    """Begin and end of a message's content within ``spans``, from ``position`` on."""
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name", "")
        if not any(name in text[max(start, position) : end] for start, end in spans):
            raise Unusable(LEAVES_OUT)
    content = message["content"] or ""
    for wanted in (content,) if exact else (content, content.strip()):
        for start, end in spans:
            found = text.find(wanted, max(start, position), end)
            if found >= 0:
                return found, found + len(wanted)
    raise Unusable(REWRITES_STEPS if exact else LEAVES_OUT)
