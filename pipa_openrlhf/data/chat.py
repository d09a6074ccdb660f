"""Chat templates: where one comes from, and what it writes."""

import os
import re
from datetime import datetime
from functools import partial
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pipa_openrlhf.errors import UserError, first_line

FLAG = "--data.tokenizer_chat_template"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "What is 6 times 7?"

Spans = list[tuple[int, int]]


class Unusable(Exception):
    """This tokenizer or its chat template cannot express the record; the message is the reason to count."""


def use_chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Give the tokenizer the template of ``--data.tokenizer_chat_template``, where there is one, and try it.

    Args:
        given: path of a file, or a template. The tokenizer keeps it, so that it is saved with the model.

    Raises:
        UserError: no such file, no template at all, or one that does not write a user's message.
    """
    if given:
        tokenizer.chat_template = _read(given)
    if not tokenizer.chat_template:
        raise UserError(f"--data.apply_chat_template: the tokenizer has none; give {FLAG}")
    origin = f"{FLAG} {_shown(given)}" if given else "the tokenizer's chat template"
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
    """The text of messages.

    Args:
        options: ``add_generation_prompt`` or ``continue_final_message``.

    Raises:
        Unusable: the template refuses the messages.
    """
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program: it may raise anything about messages it does not know
        raise Unusable(f"the chat template refuses the messages: {first_line(error)}") from error


def apply_with_marks(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[str, Spans | None]:
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
    texts, marks = cast(tuple[list[str], list[Spans]], rendered)  # transformers declares a string
    return texts[0], marks[0]


def _read(given: str) -> str:
    if not os.path.isfile(given):
        if "{" not in given:
            raise UserError(f"{FLAG} {_shown(given)}: no such file, and no Jinja template; check the path")
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{FLAG} {given}: cannot be read ({first_line(error)}); give a UTF-8 text file") from error


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
