"""Whether the Hugging Face hub can be reached."""

from functools import cache

_TIMEOUT = 5  # seconds; the hub answers well within


@cache
def hub_answers() -> bool:
    """Whether it can, asked once: loading would spend most of a minute on retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # the network's own exceptions depend on the http library in use
        return False
    return True
