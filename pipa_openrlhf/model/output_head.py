"""Log-probs of chosen tokens, and losses over them, without the logits of a whole batch in memory."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from pipa_openrlhf.distributed.strategy import free_memory
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.batch_loss import TokenTerms

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
    decoder, head = (names.get(id(one), "") for one in (decoder_of(causal_lm), causal_lm.get_output_embeddings()))
    if not (decoder and head):
        raise UserError(
            f"{type(causal_lm).__name__} has no decoder with an output head of its own: it is not a model that this "
            "package can train"
        )
    return tuple(decoder.split(".")), tuple(head.split("."))


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

    last_hidden_state: torch.Tensor

    def __new__(cls, hidden: torch.Tensor):
        made = super().__new__(cls, (hidden,))
        made.last_hidden_state = hidden
        return made

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


# Logits of one chunk on a CPU, and the fewest elsewhere: 2**25 float32 values are 128 MiB.
CHUNK_LOGITS = 2**25
# With more tokens a chunk, no accelerator multiplies faster.
_MOST_CHUNK_TOKENS = 2048
# Of the memory that is free when a chunk's logits are made. The rest is for what they are made of, and for holes.
_SHARE_OF_FREE = 0.25
# Logits in 16 bits and in float32, log-probs, and gradients of both.
_BYTES_A_LOGIT = 16


def chunk_tokens(vocabulary: int, free: int | None) -> int:
    """How many tokens have their logits in memory at the same time.

    Args:
        free: bytes that can still be allocated; None on a CPU, where small chunks are as fast.
    """
    fewest = max(1, CHUNK_LOGITS // vocabulary)
    if free is None:
        return fewest
    fitting = int(free * _SHARE_OF_FREE) // (_BYTES_A_LOGIT * vocabulary)
    # A power of two: little more or less free memory leaves it as it is, and the allocator finds its blocks again.
    return max(fewest, min(_MOST_CHUNK_TOKENS, 1 << max(fitting.bit_length() - 1, 0)))


def install_chunked_head(causal_lm: PreTrainedModel) -> nn.Module:
    """Give the output head two more calls, both on hidden states [N, d] and targets [N]:

    - ``head(hidden, targets)`` -> log-probs [N] float32;
    - ``head(hidden, targets, u, terms)`` -> (log-probs [N] without gradient, loss), in a single pass.

    The model's own code makes the logits, chunk by chunk, inside one call of the head's module: under ZeRO-3 its
    weight is gathered once around that call, forward and backward, on every rank alike. ``head(hidden)`` is unchanged.

    Raises:
        UserError: the model has no separate decoder and output head.
    """
    head = causal_lm.get_output_embeddings()
    parameters = tail_parameters(causal_lm)
    plain_forward = head.forward

    def forward(
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        u: torch.Tensor | None = None,
        terms: TokenTerms | None = None,
    ):
        if targets is None:
            return plain_forward(hidden)
        logits_of = tail_of(causal_lm, plain_forward)
        size = chunk_tokens(head.weight.shape[0], free_memory())
        if u is None or terms is None:
            return chunked_log_probs(hidden, targets, logits_of, parameters, size)
        return single_pass_loss(hidden, targets, u, terms, logits_of, parameters, size)

    head.forward = forward
    return head


def chunked_log_probs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    logits_of: LogitsOf,
    head_parameters: tuple[nn.Parameter, ...],
    chunk_size: int,
) -> torch.Tensor:
    """log softmax(logits_of(hidden))[target], with the logits of one chunk alive at a time, backward included.

    Args:
        hidden: [N, d].
        targets: [N] token ids.
        logits_of: [n, d] -> [n, vocabulary], float32 or wider.
        head_parameters: what ``logits_of`` uses; frozen ones get no gradient.
        chunk_size: tokens a chunk.

    Returns:
        [N], float32 or wider.
    """
    trained = tuple(one for one in head_parameters if one.requires_grad)
    return _ChunkedLogProbs.apply(hidden, targets, logits_of, chunk_size, *trained)


def single_pass_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    u: torch.Tensor,
    terms: TokenTerms,
    logits_of: LogitsOf,
    head_parameters: tuple[nn.Parameter, ...],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the loss over them; the gradient is formed in the forward pass, while a chunk's logits are alive.

    Nothing is computed twice: two products with the output head a token, three where the head itself is trained.

    Args:
        hidden, targets, logits_of, head_parameters, chunk_size: as in :func:`chunked_log_probs`.
        u: [N] value logits; the loss has no gradient with respect to them here.

    Returns:
        Log-probs [N] without gradient, and the loss, a scalar; float32 or wider.
    """
    trained = tuple(one for one in head_parameters if one.requires_grad)
    return _SinglePassLoss.apply(hidden, targets, u.detach(), terms, logits_of, chunk_size, *trained)


class _Gradients:
    """Gradient of a sum over chunks, with respect to their hidden states and to the trained parameters.

    The parameters' sums are float32: in bf16 every chunk would round them again.
    """

    def __init__(self, hidden: torch.Tensor, trained: tuple[nn.Parameter, ...]):
        self.hidden = torch.empty_like(hidden)
        self.trained = trained
        self.sums: list[torch.Tensor | None] = [None] * len(trained)

    def add(self, part: slice, leaf: torch.Tensor, scalar: torch.Tensor) -> None:
        """Add the gradient of a chunk's ``scalar``, which was computed from ``leaf``, the chunk's hidden states."""
        self.hidden[part], *grads = torch.autograd.grad(scalar, (leaf, *self.trained), allow_unused=True)
        for index, grad in enumerate(grads):
            total = self.sums[index]
            if grad is not None and total is None:
                self.sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
            elif grad is not None and total is not None:
                total += grad


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, logits_of, chunk_size, *trained):
        ctx.save_for_backward(hidden, targets)
        ctx.logits_of, ctx.chunk_size, ctx.trained = logits_of, chunk_size, trained
        parts = zip(hidden.split(chunk_size), targets.split(chunk_size))
        return torch.cat([_log_probs(logits_of, *part) for part in parts])

    @staticmethod
    def backward(ctx, log_probs_grad):
        # Recomputing a chunk's logits is what keeps only one chunk alive.
        hidden, targets = ctx.saved_tensors
        gradients = _Gradients(hidden, ctx.trained)
        for part in _chunks(len(targets), ctx.chunk_size):
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                log_probs = _log_probs(ctx.logits_of, leaf, targets[part])
                gradients.add(part, leaf, (log_probs * log_probs_grad[part]).sum())
        sums = [None if one is None else one.to(own.dtype) for one, own in zip(gradients.sums, ctx.trained)]
        return gradients.hidden, None, None, None, *sums


class _SinglePassLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, u, terms, logits_of, chunk_size, *trained):
        precision = torch.promote_types(hidden.dtype, torch.float32)
        log_f = torch.empty(len(targets), dtype=precision, device=hidden.device)
        loss = torch.zeros((), dtype=precision, device=hidden.device)
        gradients = _Gradients(hidden, trained)
        for part in _chunks(len(targets), chunk_size):
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                part_log_f = _log_probs(logits_of, leaf, targets[part])
                part_loss = terms.loss(part_log_f, u[part], part)
                gradients.add(part, leaf, part_loss)
            log_f[part] = part_log_f.detach()
            loss += part_loss.detach()
        ctx.save_for_backward(gradients.hidden, *gradients.sums)
        ctx.dtypes = [hidden.dtype, *(one.dtype for one in trained)]
        ctx.mark_non_differentiable(log_f)
        return log_f, loss

    @staticmethod
    def backward(ctx, _, loss_grad):
        grads = zip(ctx.saved_tensors, ctx.dtypes)
        hidden_grad, *sums = [None if grad is None else (loss_grad * grad).to(dtype) for grad, dtype in grads]
        return hidden_grad, None, None, None, None, None, *sums


def _log_probs(logits_of: LogitsOf, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits_of(hidden), targets, reduction="none")


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
