"""The date that chat templates write, fixed for a run: a run that is resumed tomorrow must render the same text."""

from datetime import datetime
from functools import partial

from transformers import PreTrainedTokenizerBase


def fix_template_date(tokenizer: PreTrainedTokenizerBase, time: str) -> None:
    """Make every chat template that ``tokenizer`` applies believe that it is ``time``.

    Args:
        tokenizer: changed in place; what it saves stays as it is.
        time: ISO format.
    """
    # transformers hands keyword arguments to the template, where they go before its own functions.
    tokenizer.apply_chat_template = partial(
        tokenizer.apply_chat_template, strftime_now=datetime.fromisoformat(time).strftime
    )
