"""A record as text: the prompt, and the pieces of the answer that must not share a token."""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.record import Record


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


class Unusable(Exception):
    """This tokenizer or its chat template cannot express the record; the message is the reason to count."""


def render(record: Record, tokenizer: PreTrainedTokenizerBase, step_separator: str) -> Rendered:
    """The record's text, through the chat template where the prompt is messages.

    Raises:
        Unusable: the chat template changes the prompt or the steps.
    """
    if isinstance(record.prompt, str):
        prompt, steps, shift = record.prompt, _without_eos(record.steps, tokenizer.eos_token), 0
        texts = [step + step_separator for step in steps[:-1]] + steps[-1:]
    else:
        prompt, texts, shift = _render_chat(record, tokenizer, step_separator)
    return Rendered(prompt, _cut_out_masked(texts, record.masked_spans, shift))


def _without_eos(steps: list[str], eos: str) -> list[str]:
    """An answer that ends with the eos string has it as its eos, so it must not be written twice."""
    return [*steps[:-1], steps[-1].removesuffix(eos)]


def _render_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase, step_separator: str
) -> tuple[str, list[str], int]:
    """Prompt, text of each step, and how many characters the template puts before the first step's own text."""
    eos = tokenizer.eos_token
    if record.messages is None:
        steps = _without_eos(record.steps, eos)
        messages = [{"role": "assistant", "content": step_separator.join(steps)}]
    else:
        steps = record.steps
        last = record.messages[-1]
        messages = [*record.messages[:-1], {**last, "content": last["content"].removesuffix(eos)}]

    prompt = _apply_template(tokenizer, record.prompt, add_generation_prompt=True)
    full = _apply_template(tokenizer, record.prompt + messages, add_generation_prompt=False)
    if not full.startswith(prompt):
        raise Unusable("the chat template rewrites the prompt")
    answer = full[len(prompt) :]
    if len(steps) > 1 or record.masked_spans:
        return prompt, *_split_steps(answer, steps, step_separator, eos)

    last_turn = 0
    if len(messages) > 1:
        before = _apply_template(tokenizer, record.prompt + messages[:-1], add_generation_prompt=True)
        last_turn = len(before) - len(prompt)
    return prompt, [_cut_after_eos(answer, _end_of(messages[-1]["content"], answer, last_turn), eos)], 0


def _split_steps(answer: str, steps: list[str], step_separator: str, eos: str) -> tuple[list[str], int]:
    """Text of each step in the rendered answer, and where the first step's own text starts in it."""
    content = step_separator.join(steps)
    start = answer.find(content)
    if start < 0:
        raise Unusable("the chat template rewrites the steps")
    answer = _cut_after_eos(answer, start + len(content), eos)
    texts, position, end = [], 0, start
    for step in steps[:-1]:
        end += len(step) + len(step_separator)
        texts.append(answer[position:end])
        position = end
    return [*texts, answer[position:]], start


def _end_of(content: str, answer: str, last_turn: int) -> int:
    """Where the last message's content ends at the earliest; a template may trim it."""
    trimmed = content.strip()
    start = answer.find(trimmed, last_turn)
    return last_turn if start < 0 else start + len(trimmed)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: it may raise anything about messages it does not know
        raise Unusable(f"the chat template refuses the messages: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cut_after_eos(answer: str, search_from: int, eos: str) -> str:
    """The answer up to its last eos, without it; all of it where the template writes no eos after the content."""
    position = answer.rfind(eos, search_from)
    return answer if position < 0 else answer[:position]


def _cut_out_masked(texts: list[str], spans: tuple[tuple[int, int, int], ...], shift: int) -> list[Piece]:
    """Split each step's text at the edges of its masked spans; ``shift`` moves the spans of the first step."""
    pieces = []
    for index, text in enumerate(texts):
        position = 0
        for _, start, end in sorted(span for span in spans if span[0] == index):
            start, end = (start + shift, end + shift) if index == 0 else (start, end)
            pieces += [Piece(text[position:start], index, False), Piece(text[start:end], index, True)]
            position = end
        pieces.append(Piece(text[position:], index, False))
    return [piece for piece in pieces if piece.text]
