"""Log-probs of chosen tokens, and losses over them, without the logits of a whole batch in memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from pipa_openrlhf.losses.token_terms import TokenTerms

# Logits of one chunk: 2**25 float32 values are 128 MiB.
CHUNK_LOGITS = 2**25


def install_chunked_head(causal_lm: PreTrainedModel) -> nn.Module:
    """Give the output head two more calls, both on hidden states [N, d] and targets [N]:

    - ``head(hidden, targets)`` -> log-probs [N] float32;
    - ``head(hidden, targets, u, terms)`` -> (log-probs [N] without gradient, loss), in a single pass.

    The head's own module does the work, chunk by chunk, inside one call: under ZeRO-3 its weight is gathered once
    around that call, forward and backward, on every rank alike. ``head(hidden)`` still returns logits.
    """
    head = causal_lm.get_output_embeddings()
    plain_forward = head.forward
    transform = logit_transform(causal_lm.config)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        return transform(plain_forward(hidden).float())

    def forward(
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        u: torch.Tensor | None = None,
        terms: TokenTerms | None = None,
    ):
        if targets is None:
            return plain_forward(hidden)
        size = max(1, CHUNK_LOGITS // head.weight.shape[0])
        if terms is None:
            return chunked_log_probs(hidden, targets, logits_of, size)
        return single_pass_loss(hidden, targets, u, terms, logits_of, tuple(head.parameters()), size)

    head.forward = forward
    return head


def chunked_log_probs(
    hidden: torch.Tensor, targets: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], chunk_size: int
) -> torch.Tensor:
    """log softmax(logits_of(hidden))[target], with the logits of one chunk alive at a time, backward included.

    Args:
        hidden: [N, d].
        targets: [N] token ids.
        logits_of: [n, d] -> float32 [n, vocabulary].
        chunk_size: tokens a chunk.

    Returns:
        [N] float32.
    """

    def log_probs(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits_of(part), part_targets, reduction="none")

    parts = zip(hidden.split(chunk_size), targets.split(chunk_size))
    if torch.is_grad_enabled():
        # Recomputing a chunk's logits in the backward pass is what keeps only one chunk alive.
        results = [checkpoint(log_probs, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        results = [log_probs(*part) for part in parts]
    return torch.cat(results)


def single_pass_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    u: torch.Tensor,
    terms: TokenTerms,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    head_parameters: tuple[nn.Parameter, ...],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the loss over them; the gradient is formed in the forward pass, while a chunk's logits are alive.

    Nothing is computed twice: two products with the output head a token, three where the head itself is trained.

    Args:
        hidden: [N, d].
        targets: [N] token ids.
        u: [N] value logits; the loss has no gradient with respect to them here.
        logits_of: [n, d] -> [n, vocabulary], float32 or wider.
        head_parameters: of the output head; frozen ones get no gradient.

    Returns:
        Log-probs [N] without gradient, and the loss, a scalar; float32 or wider.
    """
    trained = tuple(one for one in head_parameters if one.requires_grad)
    return _SinglePassLoss.apply(hidden, targets, u.detach(), terms, logits_of, chunk_size, *trained)


class _SinglePassLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, u, terms, logits_of, chunk_size, *trained):
        precision = torch.promote_types(hidden.dtype, torch.float32)
        log_f = torch.empty(len(targets), dtype=precision, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        trained_grads = [torch.zeros_like(one) for one in trained]
        loss = torch.zeros((), dtype=precision, device=hidden.device)
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                part_log_f = -F.cross_entropy(logits_of(leaf), targets[part], reduction="none")
                part_loss = terms.loss(part_log_f, u[part], part)
                leaf_grad, *part_grads = torch.autograd.grad(part_loss, (leaf, *trained))
            log_f[part], hidden_grad[part] = part_log_f.detach(), leaf_grad
            loss += part_loss.detach()
            for total, part_grad in zip(trained_grads, part_grads):
                total += part_grad
        ctx.save_for_backward(hidden_grad, *trained_grads)
        ctx.mark_non_differentiable(log_f)
        return log_f, loss

    @staticmethod
    def backward(ctx, _, loss_grad):
        hidden_grad, *trained_grads = ctx.saved_tensors
        scaled = [(loss_grad * grad).to(grad.dtype) for grad in (hidden_grad, *trained_grads)]
        return scaled[0], None, None, None, None, None, *scaled[1:]


def logit_transform(config: PretrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an architecture does to its logits after the output head (Gemma, Granite, Cohere, Falcon-H1)."""
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None):
            scale *= getattr(config, name)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if scale != 1.0:
            logits = logits * scale
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform
