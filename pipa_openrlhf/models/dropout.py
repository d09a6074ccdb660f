"""A model's own dropout, which makes the policy differ from its prior before anything is trained."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig


def disable_dropout(model: nn.Module) -> int:
    """Turn off all dropout of ``model``: modules, and the numbers that its attention reads from itself or its config.

    Returns:
        How many of them were on.
    """
    settings = [(holder, name) for holder in _holders(model) for name in _dropout_names(holder)]
    for holder, name in settings:
        setattr(holder, name, 0.0)
    return len(settings)


def _dropout_names(holder: nn.Module | PreTrainedConfig) -> list[str]:
    is_dropout = isinstance(holder, nn.Module) and "drop" in type(holder).__name__.lower()
    return [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and ("drop" in name.lower() or (is_dropout and name == "p"))
    ]


def _holders(model: nn.Module) -> Iterator[nn.Module | PreTrainedConfig]:
    waiting, seen = list(model.modules()), set()
    while waiting:
        holder = waiting.pop()
        if id(holder) not in seen:
            seen.add(id(holder))
            yield holder
            waiting += [value for value in vars(holder).values() if isinstance(value, PreTrainedConfig)]
