"""``--data.input_template``: text around a text prompt."""

from pipa_openrlhf.errors import UserError

_HOLE = "\0"


def fill_template(prompt: str, input_template: str | None) -> str:
    """The prompt in ``--data.input_template``; a template without ``{}`` is not used.

    Raises:
        UserError: it is no format string with one ``{}``.
    """
    if input_template is None or "{}" not in input_template:
        return prompt
    try:
        return input_template.format(prompt)
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"--data.input_template: {type(error).__name__} {error}; use one {{}} and double every other brace"
        ) from error


def template_spans(prompt: str, input_template: str | None) -> tuple[tuple[int, int], ...]:
    """``(start, end)`` of what the template wrote into :func:`fill_template`'s text, before and after the prompt."""
    head, _, tail = fill_template(_HOLE, input_template).partition(_HOLE)
    end = len(head) + len(prompt)
    return ((0, len(head)), (end, end + len(tail))) if head or tail else ()
