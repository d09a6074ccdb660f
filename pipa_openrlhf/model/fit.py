"""Can the model take the run's longest sequence, and does a short one stay the same beside it?"""

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.adapters import adapter_vocabulary, is_adapter, root_model
from pipa_openrlhf.model.loading import empty_causal_lm, load_tokenizer, only_from_disk
from pipa_openrlhf.model.output_head import only_accepted
from pipa_openrlhf.model.own_forward import difference, largest_of_ranks, whole_rows
from pipa_openrlhf.model.policy import PolicyActor

log = logging.getLogger(__name__)


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
