"""Log-probs of chosen tokens without the logits of a whole batch in memory."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

# Logits of one chunk: 2**25 float32 values are 128 MiB.
CHUNK_LOGITS = 2**25


def install_chunked_head(causal_lm: PreTrainedModel) -> nn.Module:
    """Give the output head a second call: ``head(hidden [N, d], targets [N]) -> log-probs [N]``, float32.

    The head's own module computes them, chunk by chunk, inside one call: under ZeRO-3 its weight is gathered once
    around that call, forward and backward, on every rank alike. ``head(hidden)`` still returns logits.
    """
    head = causal_lm.get_output_embeddings()
    logits_of = head.forward
    transform = logit_transform(causal_lm.config)

    def forward(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return logits_of(hidden)
        return chunked_log_probs(
            hidden, targets, lambda part: transform(logits_of(part).float()), head.weight.shape[0]
        )

    head.forward = forward
    return head


def chunked_log_probs(hidden: torch.Tensor, targets: torch.Tensor, logits_of, vocab_size: int) -> torch.Tensor:
    """log softmax(logits_of(hidden))[target], with the logits of one chunk alive at a time, backward included.

    Args:
        hidden: [N, d].
        targets: [N] token ids.
        logits_of: [n, d] -> float32 [n, vocab_size].

    Returns:
        [N] float32.
    """

    def log_probs(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
        logits = logits_of(part)
        return logits.gather(1, part_targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)

    size = max(1, CHUNK_LOGITS // vocab_size)
    parts = zip(hidden.split(size), targets.split(size))
    if torch.is_grad_enabled():
        # Recomputing a chunk's logits in the backward pass is what keeps only one chunk alive.
        results = [checkpoint(log_probs, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        results = [log_probs(*part) for part in parts]
    return torch.cat(results)


def logit_transform(config: PretrainedConfig):
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
