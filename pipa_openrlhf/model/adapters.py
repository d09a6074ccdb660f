"""Adapters: found, sized, and merged into their base without changing what the two compute together."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pipa_openrlhf.errors import UserError, first_line, is_adapter

log = logging.getLogger(__name__)

_PROBE_TOKENS = 8
# Share of the logits' spread by which merging may change them unseen, and how many times what rounding explains.
_MERGE_CHANGE = 1e-3
_MERGE_TOLERANCE = 3.0
_COARSE_MERGE_CHANGE = 0.2  # such a share where that cannot be measured: quantised weights are quantised again


def adapter_base(path: str) -> tuple[str, str | None]:
    """Name or folder of the model that the adapter in ``path`` belongs to, and its revision on the hub.

    A relative folder may be beside the adapter. A folder has no revision.

    Raises:
        UserError: the adapter names no model.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}/adapter_config.json is not a config of an adapter: {first_line(error)}") from error
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base_model_name_or_path: add it, or merge the adapter")
    beside = os.path.join(path, base)
    if not os.path.isdir(base) and os.path.isdir(beside):
        base = beside
    return base, None if os.path.isdir(base) else config.revision


def vllm_rank(rank: int) -> int | None:
    """What vLLM is to be told as ``max_lora_rank`` for an adapter of this rank; None for one of a higher rank."""
    return next((one for one in (1, 8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), None)


def root_model(path: str) -> tuple[str, str | None]:
    """The model below all adapters and its revision: ``path`` itself where it holds none."""
    revision = None
    while is_adapter(path):
        path, revision = adapter_base(path)
    return path, revision


def _vocabulary(lm: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    return cast(nn.Embedding, lm.get_input_embeddings()).weight.shape[0]


def base_model(model: PeftModel) -> PreTrainedModel:
    """The language model in PEFT's wrapper; PEFT would wrap any module."""
    return cast(PreTrainedModel, model.get_base_model())


def adapter_vocabulary(path: str, base: PreTrainedModel) -> int | None:
    """Rows of the embeddings or output head that the adapter in ``path`` brings; None where it brings neither.

    Args:
        base: the adapter's base, with or without weights.
    """
    file = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(file):
        return None
    names = {id(module): name for name, module in base.named_modules()}
    wanted = []
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None:
            prefix = f"base_model.model.{names[id(module)]}"
            wanted += [(f"{prefix}.weight", 0), (f"{prefix}.lora_embedding_A", 1)]
    with safe_open(file, framework="pt") as tensors:
        kept = set(tensors.keys())
        return next((tensors.get_slice(key).get_shape()[axis] for key, axis in wanted if key in kept), None)


def merge_adapter(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """``base`` with the adapter in ``path`` merged, trainable where ``base`` was.

    Raises:
        UserError: merging would give another model.
    """
    frozen = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    rows = adapter_vocabulary(path, base)
    if rows is not None and rows != _vocabulary(base):
        base.resize_token_embeddings(rows, mean_resizing=False)
    merged = merge(PeftModel.from_pretrained(base, path), path)
    for name, parameter in merged.named_parameters():
        # PEFT freezes the base, and merging leaves it frozen.
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    return merged


@torch.no_grad()
def merge(model: PeftModel, what: str) -> PreTrainedModel:
    """The base with its adapter merged, checked on the log-probs of a few tokens; ``what`` names it in an error.

    Raises:
        UserError: the merged model is another one.
    """
    base = base_model(model)
    before = _probe(base)
    _untie_adapted_embeddings(base)
    merged = model.merge_and_unload()
    if before is None:
        log.info(f"{what}: merged without a check, as the model does not run where its weights are")
        return merged
    after = _probe(merged)
    if after is None:
        raise UserError(f"{what}: the model does not run with the adapter merged: give a merged model")
    change = _share_of_spread(after - before, before)
    if change <= _MERGE_CHANGE:
        return merged
    with rounded_otherwise(merged, seed=0):
        rounded = _probe(merged)
    allowed = torch.tensor(_COARSE_MERGE_CHANGE)
    if rounded is not None and all(one.is_floating_point() for one in merged.parameters()):
        allowed = _MERGE_TOLERANCE * _share_of_spread(rounded - after, before)
    if not change <= allowed:
        raise UserError(
            f"{what}: merging the adapter changes log-probs by up to {(after - before).abs().max():.3g}, "
            f"{change / allowed:.2g} times what rounding explains: merge it with the PEFT that trained it, "
            "and give the merged model"
        )
    return merged


def _share_of_spread(change: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Of most tokens' ``log_probs`` [_PROBE_TOKENS, V]; one token, often the first, may turn over by a rounding."""
    spread = (log_probs - log_probs.mean(-1, keepdim=True)).norm(dim=-1)
    return (change.norm(dim=-1) / spread).median()


@contextmanager
def rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within, every layer's output is changed by up to one rounding of its data type."""
    generator_on = cache(lambda device: torch.Generator(device).manual_seed(seed))

    def change(value):
        if isinstance(value, tuple):
            return tuple(map(change, value))
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        generator = generator_on(wide.device)
        relative = torch.rand(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator) * 2 - 1
        return (wide * (1 + torch.finfo(value.dtype).eps * relative)).to(value.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(lambda _module, _inputs, output: change(output)) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _untie_adapted_embeddings(lm: PreTrainedModel) -> None:
    """Give the output head weights of its own where an adapter on one side of a tied pair would change the other."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is None or not any(isinstance(one, BaseTunerLayer) for one in (embedding, head)):
        return
    if head.weight is embedding.weight:
        plain = cast(nn.Linear, head.get_base_layer() if isinstance(head, BaseTunerLayer) else head)
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False


def _probe(lm: PreTrainedModel) -> torch.Tensor | None:
    """[_PROBE_TOKENS, V] float32 log-probs after tokens spread over the vocabulary.

    None for a model that cannot run where its weights are, such as one whose kernels need the accelerator.
    """
    rows = _vocabulary(lm)
    tokens = torch.linspace(0, rows - 1, _PROBE_TOKENS, device=lm.device).long()[None]
    used, training = lm.config._attn_implementation, lm.training
    has_kernels = used not in ("eager", "sdpa")
    try:
        if has_kernels:
            lm.set_attn_implementation("eager")
        logits = lm.eval()(input_ids=tokens, use_cache=False).logits[0]
    except (RuntimeError, ImportError, NotImplementedError, ValueError):
        return None
    finally:
        if has_kernels:
            lm.set_attn_implementation(used)
        lm.train(training)
    return torch.log_softmax(logits.float(), -1)
