"""The text a model is asked with: the same that training puts before an answer."""

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.chat_template import Unusable, apply_template
from pipa_openrlhf.errors import UserError


def prompt_text(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    input_template: str | None = None,
    apply_chat_template: bool = False,
) -> str:
    """The question in the chat template, or else in ``input_template``, or else as it is.

    As in training, a template without ``{}`` is not used.

    Raises:
        UserError: the chat template refuses the question, or ``input_template`` is no format string with one ``{}``.
    """
    if apply_chat_template:
        try:
            return apply_template(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        except Unusable as reason:
            raise UserError(f"{reason}; give --data.tokenizer_chat_template, or change the question") from reason
    if input_template is None or "{}" not in input_template:
        return question
    try:
        return input_template.format(question)
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"--data.input_template: {type(error).__name__} {error}; use one {{}} and double every other brace"
        ) from error
