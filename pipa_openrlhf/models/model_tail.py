"""From hidden states to logits by the model's own code: scales, soft caps and vocabulary slices are all its own.

Every architecture does something else around its output head. Its ``forward`` is run as it is, on a shallow copy of
the model in which the decoder is a stand-in that returns given hidden states.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipa_openrlhf.errors import UserError

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def tail_of(causal_lm: PreTrainedModel, head_forward: LogitsOf) -> LogitsOf:
    """[n, d] hidden states to [n, vocabulary] logits, float32 or wider, as ``causal_lm.forward`` makes them.

    Args:
        head_forward: the output head's own forward. Calling the module itself would release its weight under ZeRO-3.
    """
    decoder_path, head_path = _paths(causal_lm)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        view = copy.copy(causal_lm)
        head = causal_lm.get_submodule(".".join(head_path))
        _replace(view, head_path, _StandIn(head, (), head_forward))
        module = getattr(causal_lm, decoder_path[0])
        output = _Output(hidden[None])
        view.__dict__[decoder_path[0]] = _StandIn(module, decoder_path[1:], lambda *_, **__: output)
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        # The class's method: one that was set on the model itself is bound to the model, not to its copy.
        result = type(causal_lm).forward(view, tokens, **only_accepted(causal_lm, use_cache=False))
        logits = result.logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    return logits_of


def tail_parameters(causal_lm: PreTrainedModel) -> tuple[nn.Parameter, ...]:
    """What :func:`tail_of` may use: the head's parameters, and all outside the decoder.

    Raises:
        UserError: the model has no separate decoder and output head.
    """
    _paths(causal_lm)
    of_head = list(causal_lm.get_output_embeddings().parameters())
    seen = {id(one) for one in (*decoder_of(causal_lm).parameters(), *of_head)}
    return (*of_head, *(one for one in causal_lm.parameters() if id(one) not in seen))


def decoder_of(causal_lm: PreTrainedModel) -> nn.Module:
    """The part of the model that turns tokens into the hidden states of its output head."""
    decoder = causal_lm.get_decoder()
    if decoder is not causal_lm and decoder is not causal_lm.get_output_embeddings():
        return decoder
    # Its base_model_prefix names nothing, or its output head is called "decoder".
    inner = [child for child in causal_lm.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else causal_lm


def only_accepted(model: nn.Module, **options) -> dict[str, Any]:
    """The ``options`` that ``model.forward`` has a name for."""
    return {name: value for name, value in options.items() if name in inspect.signature(model.forward).parameters}


def _paths(causal_lm: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Attribute names that lead from the model to its decoder and to its output head."""
    names = {id(module): name for name, module in causal_lm.named_modules()}
    found = [names.get(id(one)) for one in (decoder_of(causal_lm), causal_lm.get_output_embeddings())]
    if not all(found):
        raise UserError(
            f"{type(causal_lm).__name__} has no decoder with an output head of its own: it is not a model that this "
            "package can train"
        )
    decoder, head = (tuple(name.split(".")) for name in found)
    return decoder, head


def _replace(module: nn.Module, path: tuple[str, ...], replacement: "_StandIn") -> None:
    """Put ``replacement`` at ``path`` of ``module``, a copy; modules on the way are copied too."""
    for name in path[:-1]:
        module.__dict__[name] = copy.copy(getattr(module, name))
        module = module.__dict__[name]
    module.__dict__[path[-1]] = replacement


class _StandIn:
    """A module in all but its call. ``path`` leads on to a module within, which has the same call."""

    def __init__(self, module: nn.Module, path: tuple[str, ...], call: Callable):
        self._module, self._path, self._call = module, path, call

    def __call__(self, *args, **options):
        return self._call(*args, **options)

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return _StandIn(value, self._path[1:], self._call) if self._path[:1] == (name,) else value


class _Output(tuple):
    """A decoder's output that holds its last hidden state and nothing else."""

    def __new__(cls, hidden: torch.Tensor):
        made = super().__new__(cls, (hidden,))
        made.last_hidden_state = hidden
        return made

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None
