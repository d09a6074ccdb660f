"""A record as text: the prompt, and the pieces of the answer that must not share a token."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.chat_template import Spans
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.turns import render_turns


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


def render(record: Record, tokenizer: PreTrainedTokenizerBase, step_separator: str) -> Rendered:
    """The record's text, through the chat template where the prompt is messages.

    Raises:
        Unusable: the chat template changes the prompt or the answer, or does not show what the model wrote.
    """
    eos = tokenizer.eos_token
    if record.messages is None:
        # An answer that ends with the eos string has it as its eos, so it must not be written twice.
        steps = [*record.steps[:-1], record.steps[-1].removesuffix(eos)]
        messages = [{"role": "assistant", "content": step_separator.join(steps)}]
    else:
        steps, messages = record.steps, [_without_eos(message, eos) for message in record.messages]
    starts = list(accumulate((len(step) + len(step_separator) for step in steps[:-1]), initial=0))
    if isinstance(record.prompt, str):
        return Rendered(record.prompt, _pieces(messages[0]["content"], starts, _tool_output(record, starts)))

    exact = len(steps) > 1 or bool(record.masked_spans)
    turns = render_turns(tokenizer, record.prompt, messages, exact)
    answer = turns.text[turns.prompt_len :]
    written = [(start - turns.prompt_len, end - turns.prompt_len) for start, end in turns.spans]
    starts = [turns.content_start - turns.prompt_len + start for start in starts]
    masked = _between(written, len(answer)) + _tool_output(record, starts)
    return Rendered(turns.text[: turns.prompt_len], _pieces(answer, starts, masked))


def _without_eos(message: dict, eos: str) -> dict:
    if message["role"] != "assistant" or message["content"] is None:
        return message
    return {**message, "content": message["content"].removesuffix(eos)}


def _tool_output(record: Record, starts: list[int]) -> Spans:
    return [(starts[step] + start, starts[step] + end) for step, start, end in record.masked_spans]


def _between(spans: Spans, length: int) -> Spans:
    """What is outside of ``spans``, which are in order."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]


def _pieces(answer: str, starts: list[int], masked: Spans) -> list[Piece]:
    """The answer cut where a step or masked text begins or ends; what comes before the content is the first step's."""
    edges = {0, len(answer), *starts[1:], *(edge for span in masked for edge in span)}
    edges = sorted(edge for edge in edges if edge <= len(answer))
    return [
        Piece(
            answer[start:end],
            max(bisect_right(starts, start) - 1, 0),
            any(low <= start < high for low, high in masked),
        )
        for start, end in pairwise(edges)
    ]
