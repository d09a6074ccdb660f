"""Does a model fit the run's data: their tokens, and the longest sequence without a change to a short one beside it?

Its own log-probs of a handful of short sequences say so, and how much of a difference rounding explains.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.distributed.strategy import Strategy, device
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.adapters import adapter_vocabulary, is_adapter, root_model, rounded_otherwise
from pipa_openrlhf.model.loading import empty_causal_lm, load_tokenizer, only_from_disk
from pipa_openrlhf.model.output_head import only_accepted
from pipa_openrlhf.model.policy import PolicyActor

log = logging.getLogger(__name__)

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
        with rounded_otherwise(model, seed):
            noise = max(noise, difference(own_log_probs(model, samples), expected))
    return noise


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


def check_lengths(
    actor: PolicyActor,
    samples: Samples,
    probe: Sample,
    tolerance: float,
    strategy: Strategy,
    pad_token_id: int,
) -> None:
    """Refuse samples longer than the model has positions, and models whose positions depend on a batch's longest.

    Args:
        probe: a short sequence.
        tolerance: what rounding explains, in nats a token.

    Raises:
        UserError: names ``--data.max_len`` and what it may be.
    """
    policy = actor.policy
    longest = samples[int(np.argmax(samples.column("length")))]
    length = len(longest.input_ids)
    positions = _learned_positions(actor.model, probe)
    if length > positions:
        raise _too_long(longest, f"the model has {positions} positions", positions)
    if only_accepted(policy.causal_lm, position_ids=None) and length > len(probe.input_ids):
        _refuse_stretching(actor.model, probe, longest, tolerance, strategy)
    declared = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if declared is not None and length > declared:
        _run_longest(actor, longest, declared, pad_token_id)
        log.info(
            f"The longest sequence has {length} tokens ({longest.where}), the model was made for {declared}: it "
            "extrapolates"
        )


def _run_longest(actor: PolicyActor, longest: Sample, declared: int, pad_token_id: int) -> None:
    try:
        with torch.no_grad():
            actor(collate([longest], None, pad_token_id, "padded").to(device()), with_value=False)
    except (IndexError, ValueError, RuntimeError) as error:
        raise _too_long(longest, f"the model, made for {declared} tokens, fails", declared) from error


@torch.no_grad()
def _learned_positions(model: nn.Module, probe: Sample) -> float:
    """How many tokens fit into the model's table of learned positions; infinity where it has none.

    A table of positions is one whose largest index grows with the number of tokens, whatever they are.
    """
    ids = torch.full((1, 4), int(probe.input_ids.max()), device=device())
    with _Lookups() as few:
        model(batch=whole_rows(ids[:, :3]), own=True)
    with _Lookups() as more:
        model(batch=whole_rows(ids), own=True)
    tables = [table for table, index in more.largest.items() if few.largest.get(table) == index - 1]
    return min((more.sizes[table] - more.largest[table] + 3 for table in tables), default=math.inf)


class _Lookups(TorchFunctionMode):
    """Within, the size of each embedding that is looked at, and the largest index it is asked for."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.largest: dict[int, int] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.embedding:
            indices, weight = args[:2]
            self.sizes[id(weight)] = weight.shape[0]
            self.largest[id(weight)] = max(int(indices.max()), self.largest.get(id(weight), 0))
        return function(*args, **(kwargs or {}))


def _refuse_stretching(model: nn.Module, probe: Sample, longest: Sample, tolerance: float, strategy: Strategy) -> None:
    """A position far out in another row must not change a row's log-probs, as dynamic-NTK and LongRoPE let it."""
    ids = torch.from_numpy(probe.input_ids.astype(np.int64)).to(device())[None].repeat(2, 1)
    near = torch.arange(ids.shape[1], device=device())[None]

    def change(length: int) -> float:
        """Of the probe's log-probs, beside a row whose last token is a sequence's ``length``-th."""
        far = near + length - ids.shape[1]
        rows = [model(batch=whole_rows(ids, torch.cat([near, other])), own=True).log_f[0] for other in (near, far)]
        return largest_of_ranks(strategy, difference(rows[:1], rows[1:]))

    length = len(longest.input_ids)
    try:
        with torch.no_grad():
            possible = _largest_where(lambda tokens: change(tokens) <= tolerance, ids.shape[1], length)
    except (IndexError, RuntimeError) as error:
        raise _too_long(longest, "the model has no position for its last token", None) from error
    if possible < length:
        raise _too_long(
            longest, f"beside one of more than {possible} tokens the model gives a short one other log-probs", possible
        )


def _largest_where(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Largest number up to ``high`` for which ``holds``, which is true at ``low`` and changes at most once."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _too_long(longest: Sample, reason: str, possible: float | None) -> UserError:
    limit = "a smaller --data.max_len" if possible is None else f"--data.max_len {int(possible)}"
    return UserError(f"{longest.where}: a sequence of {len(longest.input_ids)} tokens, but {reason}: give {limit}")


def check_vocabulary(path: str, flag: str, token_ids: np.ndarray, trust_remote_code: bool) -> None:
    """Refuse a model that has no embedding for some token of the data.

    Raises:
        UserError: names the flag and both sizes.
    """
    root, revision = root_model(path)
    try:
        config = AutoConfig.from_pretrained(
            root, revision=revision, trust_remote_code=trust_remote_code, local_files_only=only_from_disk(root)
        )
        own = None
        if is_adapter(path):  # one that was trained with more tokens brings their embeddings
            own = adapter_vocabulary(path, empty_causal_lm(path, torch.float32, trust_remote_code))
    except (OSError, ValueError, KeyError, SafetensorError):
        return  # loading the model says better what is wrong
    size = own or config.get_text_config().vocab_size
    if token_ids.max() >= size:
        raise UserError(
            f"{flag} {path}: the data has token id {token_ids.max()}, the model {size} tokens; "
            "its tokenizer belongs to another model"
        )


def check_same_tokens(
    path: str, flag: str, token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> None:
    """Refuse a prior to which the data's token ids mean other text; one without a tokenizer is trusted.

    Raises:
        UserError: names the flag and a token.
    """
    try:
        other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    except UserError:
        return
    for token_id, ours in zip(token_ids.tolist(), tokenizer.convert_ids_to_tokens(token_ids.tolist())):
        theirs = other.convert_ids_to_tokens(token_id)
        if theirs != ours:
            raise UserError(
                f"{flag} {path}: its tokenizer has {theirs!r} as token {token_id}, the policy's has {ours!r}; "
                "a prior must have the policy's tokenizer"
            )
