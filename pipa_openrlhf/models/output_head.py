"""Log-probs of chosen tokens, and losses over them, without the logits of a whole batch in memory."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from pipa_openrlhf.losses.token_terms import TokenTerms
from pipa_openrlhf.models.model_tail import LogitsOf, tail_of, tail_parameters

# Logits of one chunk: 2**25 float32 values are 128 MiB.
CHUNK_LOGITS = 2**25


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
        size = max(1, CHUNK_LOGITS // head.weight.shape[0])
        if terms is None:
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
            if grad is not None and self.sums[index] is None:
                self.sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
            elif grad is not None:
                self.sums[index] += grad


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
    return -F.cross_entropy(logits_of(hidden), targets, reduction="none")


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
