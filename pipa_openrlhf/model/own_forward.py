"""A model's own log-probs of a handful of short sequences, and how much of a difference rounding explains."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy

# Lengths differ, so that there is padding; few tokens, so that a check costs next to nothing.
_PROMPT_TOKENS = (20, 11, 20, 17)
_ANSWER_TOKENS = (24, 13, 28, 19)
# Of the answer before, in the branches of a prefix tree.
_SHARED_TOKENS = 6

# Rounding of one layer's output is random; two rounds show what a router or an outlier makes of it.
_ROUNDS = 2


def probe_samples(samples: Samples) -> list[Sample]:
    """Four short sequences cut from ``samples``; the third begins with the first's prompt and some of its answer, the
    fourth with the third's beginning and some more of it, so that a prefix runs through two branches of their tree.
    """
    chosen = [samples[len(samples) * part // len(_PROMPT_TOKENS)] for part in range(len(_PROMPT_TOKENS))]
    probes = [_cut(*each) for each in zip(chosen, _PROMPT_TOKENS, _ANSWER_TOKENS)]
    size = probes[0].prompt_len
    for number, before in ((2, 0), (3, 2)):
        branch = size + _SHARED_TOKENS * (1 + before // 2)
        ids = np.concatenate(
            [probes[before].input_ids[:branch], probes[number].input_ids[probes[number].prompt_len :]]
        )
        answer = ids[size : size + _ANSWER_TOKENS[number]]
        ones = np.ones(len(answer), dtype=np.int8)
        probes[number] = replace(
            probes[number],
            input_ids=ids[: size + len(answer)],
            prompt_len=size,
            labels=ones,
            mask=ones,
            step_ids=np.zeros(len(answer), dtype=np.int32),
        )
    return probes


def _cut(sample: Sample, prompt_tokens: int, answer_tokens: int) -> Sample:
    """The end of its prompt and the beginning of its answer, every token of which counts."""
    start = max(0, sample.prompt_len - prompt_tokens)
    ids = sample.input_ids[start : sample.prompt_len + answer_tokens]
    length = len(ids) - (sample.prompt_len - start)
    return replace(
        sample,
        input_ids=ids,
        prompt_len=sample.prompt_len - start,
        labels=sample.labels[:length],
        mask=np.ones(length, dtype=np.int8),
        step_ids=sample.step_ids[:length],
    )


@torch.no_grad()
def own_log_probs(model: nn.Module, samples: list[Sample]) -> list[torch.Tensor]:
    """Per sample [T] float32 log-probs of its response, from the model's own forward pass over it alone.

    Args:
        model: a ``Policy``, or the engine around it.
    """
    results = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(device())
        log_probs = model(batch=whole_rows(ids[None]), own=True).log_f[0]
        # Nothing predicts the very first token of a sequence without a prompt: 0, as in a batch.
        results.append(torch.cat([log_probs.new_zeros(1), log_probs])[sample.prompt_len :])
    return results


def whole_rows(ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> Batch:
    """A batch that asks for every token of ``ids`` [R, L] but the first of each row: [R, L - 1] of them.

    Args:
        position_ids: [R, L]; None: as the model counts them.
    """
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, :-1].flatten()
    nothing = torch.zeros_like(ids[:, 1:])
    return Batch(
        input_ids=ids,
        position_ids=position_ids,
        attention_mask=None,
        hidden_index=places,
        targets=ids[:, 1:].flatten(),
        token_index=torch.arange(nothing.numel(), device=ids.device),
        labels=nothing,
        mask=nothing,
        step_ids=nothing,
        log_p=nothing.float(),
        answer_label=nothing[:, 0],
        weight=torch.ones_like(nothing[:, 0], dtype=torch.float32),
    )


def difference(rows: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root of the mean square over a sequence's tokens, in nats, of the sequence where it is largest."""
    worst = 0.0
    for row, wanted in zip(rows, expected):
        square = (row[: len(wanted)] - wanted).square().mean().item() if len(wanted) else 0.0
        worst = max(worst, math.sqrt(square) if math.isfinite(square) else math.inf)
    return worst


def rounding_noise(model: nn.Module, samples: list[Sample], expected: list[torch.Tensor]) -> float:
    """The difference that appears when every layer's output is changed by up to one rounding of its data type."""
    noise = 0.0
    for seed in range(_ROUNDS):
        with _rounded_otherwise(model, seed):
            noise = max(noise, difference(own_log_probs(model, samples), expected))
    return noise


@contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    generator = torch.Generator(device()).manual_seed(seed)

    def change(value):
        if isinstance(value, tuple):
            return tuple(map(change, value))
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        relative = torch.rand(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator) * 2 - 1
        return (wide * (1 + torch.finfo(value.dtype).eps * relative)).to(value.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(lambda _module, _inputs, output: change(output)) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_of_ranks(strategy: Strategy, value: float) -> float:
    """The largest of all ranks' values, so that they decide alike."""
    return strategy.all_reduce(torch.tensor(value, dtype=torch.float64, device=device()), op="max").item()


def can_run_eager(causal_lm: PreTrainedModel) -> bool:
    """True where the model's attention is another one than ``eager``, and can be exchanged for it."""
    if not causal_lm._can_set_attn_implementation():
        return False
    return any(config._attn_implementation not in (None, "eager") for config in _configs(causal_lm))


@contextmanager
def eager_attention(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Within, attention is the model's own code, which every kernel is to reproduce."""
    before = [(config, config._attn_implementation_internal) for config in _configs(causal_lm)]
    use_eager_attention(causal_lm)
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def use_eager_attention(causal_lm: PreTrainedModel) -> None:
    """Exchange the attention of the model and of all models within for ``eager``."""
    for config in _configs(causal_lm):
        config._attn_implementation_internal = "eager"


def _configs(causal_lm: PreTrainedModel) -> list:
    configs = {}
    for module in causal_lm.modules():
        if isinstance(module, PreTrainedModel):
            parts = [getattr(module.config, name, None) for name in module.config.sub_configs]
            configs.update({id(one): one for one in (module.config, *parts) if one is not None})
    return list(configs.values())
