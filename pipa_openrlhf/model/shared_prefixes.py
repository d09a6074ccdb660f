"""Attention for one row of tokens in which sequences share every common prefix.

A row holds the prefix tree of its sequences, and each token of it goes through every layer once. Only inside attention
is it laid out as the separate sequences that it stands for, so that each attends to itself alone with its own
positions, and any attention kernel computes it, without a mask.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipa_openrlhf.data.prefixes import SharedRow

_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def enable_shared_prefixes(lm: PreTrainedModel) -> bool:
    """Let the attention of ``lm`` take a ``shared_row``, see :func:`attend`.

    Returns:
        False where the model cannot share prefixes: a layer is not full attention (sliding window, recurrent), or its
        attention does not go through transformers' interface (``eager``, models with code of their own).
    """
    config = lm.config.get_text_config()
    kernel = config._attn_implementation
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        full = set(layer_types) == {"full_attention"}
    else:
        full = getattr(config, "sliding_window", None) is None
    if kernel not in _KERNELS or not lm._supports_attention_backend or lm._is_stateful or not full:
        return False
    inner = ALL_ATTENTION_FUNCTIONS[kernel]
    if not (isinstance(inner, partial) and inner.func is attend):
        AttentionInterface.register(kernel, partial(attend, inner))
    return True


def attend(
    inner: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    shared_row: SharedRow | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``inner``, on separate sequences where the row is a shared one.

    Args:
        inner: attention function of transformers' interface.
        query, key, value: [1, heads, L, head size] of the row's L tokens.
        attention_mask: not used with a shared row.
        shared_row: what the row stands for; None: an ordinary batch.

    Returns:
        [1, L, heads, head size], and no attention weights.
    """
    if shared_row is None:
        return inner(module, query, key, value, attention_mask, **options)
    shape = shared_row.sequence_index.shape

    def apart(row: torch.Tensor) -> torch.Tensor:
        tokens = row[0].transpose(0, 1)
        return _Apart.apply(tokens.flatten(1), shared_row).view(*shape, *tokens.shape[1:]).transpose(1, 2)

    # Sequences are padded on the right, where causal attention does not look: no mask is needed. Positions are in
    # the rotated queries and keys already, and would tell flash attention of a packed row.
    options["position_ids"] = None
    output, _ = inner(module, apart(query), apart(key), apart(value), None, **options)
    together = _Together.apply(output.flatten(2).flatten(0, 1), shared_row)
    return together.view(1, -1, *output.shape[2:]), None


class _Apart(torch.autograd.Function):
    """[L, n] tokens of a row to [B * W, n] tokens of its sequences.

    The backward pass sums over the copies of a prefix stretch by stretch: adding by index takes several times as long
    on CPU.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, shared_row: SharedRow) -> torch.Tensor:
        ctx.shared_row = shared_row
        return tokens.index_select(0, shared_row.sequence_index.flatten())

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.index_select(0, ctx.shared_row.row_index)
        for begin, end, copy in ctx.shared_row.repeats:
            total[begin:end] += grad[copy : copy + end - begin]
        return total, None


class _Together(torch.autograd.Function):
    """[B * W, n] tokens of sequences to [L, n] tokens of their row, each from its first place."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, shared_row: SharedRow) -> torch.Tensor:
        ctx.shared_row = shared_row
        return tokens.index_select(0, shared_row.row_index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        apart = grad.new_zeros(ctx.shared_row.sequence_index.numel(), grad.shape[1])
        return apart.index_copy_(0, ctx.shared_row.row_index, grad), None


def refuse_other_attention(row: torch.Tensor) -> torch.Tensor:
    """An attention mask for shared rows that no attention but :func:`attend` gets through, instead of a wrong result.

    Returns:
        [1, 1, 2, 3], which does not broadcast against attention scores; four dimensions keep transformers from
        making a mask itself.
    """
    return torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=row.device)
