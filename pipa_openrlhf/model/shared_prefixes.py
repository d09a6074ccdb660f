"""Attention for one row of tokens in which sequences share every common prefix.

A row holds the prefix tree of its sequences, and each token of it goes through every layer once. Only inside attention
is it laid out as the separate sequences that it stands for, so that each attends to itself alone with its own
positions, and any attention kernel computes it, without a mask. Where trees are so bushy that their own square is less
than that of their sequences, and the kernel takes a mask, they are laid out as trees.

A kernel for sequences of any length takes queries as they stand in the row, and no padding: each sequence brings the
tokens that it adds to the row, and its keys are all of its tokens (``KeyRow``). On CUDA flash-attn and torch have one.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipa_openrlhf.data.prefixes import KeyRow, SharedRow
from pipa_openrlhf.distributed.upstream import flash_attn_installed

# Longest sequences that plain products attend to faster than torch's kernel, forward and backward, on a CPU in bf16.
_SHORT = 192

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
        AttentionInterface.register(kernel, partial(attend, inner, takes_mask=kernel == "sdpa", kernel=kernel))
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
    takes_mask: bool = False,
    kernel: str = "",
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``inner``, on separate sequences or trees of them where the row is a shared one.

    Args:
        inner: attention function of transformers' interface.
        query, key, value: [1, heads, L, head size] of the row's L tokens.
        attention_mask: not used with a shared row.
        shared_row: what the row stands for; None: an ordinary batch.
        takes_mask: ``inner`` can attend within trees.
        kernel: its name, by which one for sequences of any length is found where there is one.

    Returns:
        [1, L, heads, head size], and no attention weights.
    """
    if shared_row is None:
        return inner(module, query, key, value, attention_mask, **options)
    varlen = _varlen_kernel(kernel, query, key, value, options)
    if varlen is not None and shared_row.keys is not None:
        return _attend_to_keys(varlen, query, key, value, shared_row.keys, options.get("scaling")), None
    if takes_mask and shared_row.trees is not None:
        shared_row = shared_row.trees
    shape = shared_row.block_index.shape

    def apart(row: torch.Tensor) -> torch.Tensor:
        tokens = row[0].transpose(0, 1)
        return _Apart.apply(tokens.flatten(1), shared_row).view(*shape, *tokens.shape[1:]).transpose(1, 2)

    # Sequences are padded on the right, where causal attention does not look: no mask is needed. Positions are in
    # the rotated queries and keys already, and would tell flash attention of a packed row.
    options["position_ids"] = None
    if takes_mask and _is_short(query, shape[1], options):
        inner = _attend_short
    output, _ = inner(module, apart(query), apart(key), apart(value), shared_row.visible, **options)
    together = _Together.apply(output.flatten(2).flatten(0, 1), shared_row)
    return together.view(1, -1, *output.shape[2:]), None


def _is_short(query: torch.Tensor, width: int, options: dict) -> bool:
    """Where torch's kernel spends most of a training step on sequences that plain products finish in a fraction."""
    on_cpu_in_half = query.device.type == "cpu" and query.dtype != torch.float32
    return on_cpu_in_half and width <= _SHORT and _is_plain(options)


def _is_plain(options: dict) -> bool:
    """Nothing but causal attention is asked for."""
    return not options.get("dropout") and options.get("position_bias") is None and options.get("is_causal", True)


def _attend_to_keys(
    varlen: "Varlen",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: KeyRow,
    scaling: float | None,
) -> torch.Tensor:
    """:func:`attend` by a kernel for sequences of any length: [1, L, heads, head size]."""
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    key, value = (one.index_select(0, keys.index) for one in (key, value))
    lengths = (keys.query_ends, keys.key_ends, keys.most_queries, keys.most_keys)
    return varlen(query, key, value, *lengths, scaling)[None]


# [L, heads, head size] queries, [K, key heads, head size] keys and values, the four lengths of a KeyRow, and the scale
# of scores -> [L, heads, head size]. A sequence's last query attends to all of its keys, the one before it to all but
# the last.
Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float | None], torch.Tensor
]


def _varlen_kernel(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict
) -> Varlen | None:
    """What computes the attention of ``kernel`` for sequences of any length; None where nothing does."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    is_capped = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if not query.is_cuda or not is_half or is_capped or not _is_plain(options):
        return None
    if kernel == "flash_attention_2":
        return _flash_attn_varlen()
    if kernel == "sdpa" and query.shape[-1] % 8 == 0 and value.shape[-1] == query.shape[-1]:
        is_grouped = query.shape[1] != key.shape[1]
        asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, is_grouped)
        return _torch_varlen() if torch.backends.cuda.can_use_flash_attention(asked) else None
    return None


@cache
def _flash_attn_varlen() -> Varlen | None:
    if not flash_attn_installed():
        return None
    from flash_attn import flash_attn_varlen_func

    def varlen(query, key, value, query_ends, key_ends, most_queries, most_keys, scaling):
        lengths = (query_ends, key_ends, most_queries, most_keys)
        options = {"softmax_scale": scaling, "deterministic": torch.are_deterministic_algorithms_enabled()}
        return flash_attn_varlen_func(query, key, value, *lengths, causal=True, **options)

    return varlen


@cache
def _torch_varlen() -> Varlen | None:
    """torch's own; None where it is not there yet, or knows no windows, as which it is told to be causal."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepted = signature(varlen_attn).parameters
    if "window_size" not in accepted:
        return None
    shares_keys = "enable_gqa" in accepted

    def varlen(query, key, value, query_ends, key_ends, most_queries, most_keys, scaling):
        options = {"scale": scaling, "window_size": (-1, 0)}
        if shares_keys:
            options["enable_gqa"] = True
        else:
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
        return varlen_attn(query, key, value, query_ends, key_ends, most_queries, most_keys, **options)

    return varlen


def _attend_short(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_options,
) -> tuple[torch.Tensor, None]:
    """Attention by plain products: that of transformers' ``sdpa`` but for rounding, as ``eager`` rounds.

    Args:
        query: [B, heads, W, head size].
        key, value: [B, key heads, W, head size].
        visible: [B, 1, W, W] bool, True where the first token attends to the second; None: to itself and all before.

    Returns:
        [B, W, heads, head size], and no attention weights.
    """
    size, width, head_size = query.shape[0], query.shape[2], query.shape[3]
    scaling = head_size**-0.5 if scaling is None else scaling
    if visible is None:
        visible = torch.ones(width, width, dtype=torch.bool, device=query.device).tril_()
    # Heads that share a key are rows of one product.
    grouped = (query * scaling).reshape(size, key.shape[1], -1, head_size)
    scores = (grouped @ key.transpose(2, 3)).view(size, -1, width, width)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    output = weights.view(*grouped.shape[:3], width) @ value
    return output.view(*query.shape[:3], -1).transpose(1, 2), None


class _Apart(torch.autograd.Function):
    """[L, n] tokens of a row to [B * W, n] tokens of its sequences.

    The backward pass sums over the copies of a prefix stretch by stretch: adding by index takes several times as long
    on CPU.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, shared_row: SharedRow) -> torch.Tensor:
        ctx.shared_row = shared_row
        return tokens.index_select(0, shared_row.block_index.flatten())

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
        apart = grad.new_zeros(ctx.shared_row.block_index.numel(), grad.shape[1])
        return apart.index_copy_(0, ctx.shared_row.row_index, grad), None


def refuse_other_attention(row: torch.Tensor) -> torch.Tensor:
    """An attention mask for shared rows that no attention but :func:`attend` gets through, instead of a wrong result.

    Returns:
        [1, 1, 2, 3], which does not broadcast against attention scores; four dimensions keep transformers from
        making a mask itself.
    """
    return torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=row.device)
