"""At start-up: are the log-probs that this run will compute the model's own?

Nothing is known about an architecture beforehand. A few short sequences of the run's data go through the model's own
forward pass, each alone, and through ours, in every layout that the run asks for. What differs by more than rounding
is not used.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.distributed.strategy import Strategy, device
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.fit import (
    can_run_eager,
    check_lengths,
    difference,
    eager_attention,
    largest_of_ranks,
    own_log_probs,
    probe_samples,
    rounding_noise,
    use_eager_attention,
)
from pipa_openrlhf.model.policy import PolicyActor
from pipa_openrlhf.prior.cache import PriorCache

log = logging.getLogger(__name__)

# Kernels and row shapes round at more places than layers' outputs, and differences of a few tokens vary.
_TOLERANCE = 3.0
_FLAGS = {"shared": "--train.share_prefixes", "packed": "--ds.packing_samples"}
# Copies of a sequence add nothing to its tree: with so many, attention takes whole trees rather than sequences.
_COPIES = 8
# Cached entries that are computed again: the shortest of the first ones found.
_CACHED_CHECKED = 4
_CACHED_LOOKED_AT = 1000


def choose_layout(run: RunConfig, actor: PolicyActor, samples: Samples, strategy: Strategy, pad_token_id: int) -> None:
    """Set ``actor.layout`` to the best one that is asked for and exact, and ``actor.tolerance``, the same on every
    rank; says what is not used, and why.

    Args:
        actor: its ``model`` is the engine that will run.
        samples: what the run will score.

    Raises:
        UserError: no layout is exact, or a sequence is longer than the model can take.
    """
    policy = actor.policy
    checks = run.model.self_check
    check = _Check(actor, probe_samples(samples), strategy, pad_token_id) if checks else None
    if check is not None:
        check.keep_attention()
    wanted = ["packed"] if run.ds.packing_samples else []
    if run.train.share_prefixes and policy.can_share_prefixes:
        wanted.insert(0, "shared")
    elif run.train.share_prefixes:
        log.info("--train.share_prefixes: this model's attention cannot, or experts are balanced; not used")
    actor.layout = [*wanted, "padded"][0] if check is None else check.first_exact(wanted)
    if check is not None:
        actor.tolerance = check.tolerance
        check_lengths(actor, samples, check.probes[0], check.tolerance, strategy, pad_token_id)


def check_cached(
    actor: PolicyActor, cache: PriorCache, samples: Samples, absent: np.ndarray, strategy: Strategy
) -> None:
    """Compute a few of the cache's entries again, by the model's own forward pass.

    Args:
        actor: the prior.
        absent: [len(samples)] bool, True at the first sample of a key without an entry; the same on every rank.

    Raises:
        UserError: an entry is not this prior's.
    """
    if actor.tolerance is None:
        return
    keys = samples.column("sequence_key")
    some = list(samples[np.flatnonzero(~np.isin(keys, keys[absent]))[:_CACHED_LOOKED_AT]])
    if not some:
        return
    few = sorted(some, key=lambda sample: len(sample.input_ids))[:_CACHED_CHECKED]
    own = own_log_probs(actor.model, few)
    entries = [torch.from_numpy(np.array(cache.log_probs(sample))).to(device()) for sample in few]
    worst = largest_of_ranks(strategy, difference(entries, own))
    if not worst <= actor.tolerance:
        raise UserError(
            f"the prior cache {cache.folder} holds log-probs that are off by {worst:.2g} nats a token (rounding "
            f"explains {actor.tolerance:.2g}): delete that folder, or give another --prior.cache_dir"
        )


@dataclass
class _Check:
    """One model against itself on ``probes``, without the dropout of training."""

    actor: PolicyActor
    probes: list[Sample]
    strategy: Strategy
    pad_token_id: int

    def __post_init__(self):
        self.policy = self.actor.policy
        self.actor.model.eval()
        self._measure()

    def _measure(self) -> None:
        self.expected = own_log_probs(self.actor.model, self.probes)
        noise = rounding_noise(self.actor.model, self.probes, self.expected)
        self.tolerance = largest_of_ranks(self.strategy, _TOLERANCE * noise + 2 * torch.finfo(torch.float32).eps)
        if not np.isfinite(self.tolerance):
            raise UserError(
                f"{self.policy.causal_lm.config._name_or_path}: the model's own log-probs are nan or infinite; its "
                "weights are damaged, or need another --ds.param_dtype"
            )

    def keep_attention(self) -> None:
        """Use the model's own attention code where the kernel gives other log-probs."""
        if not can_run_eager(self.policy.causal_lm):
            return
        with eager_attention(self.policy.causal_lm):
            eager = own_log_probs(self.actor.model, self.probes)
            # Some eager code leaves out the causal mask where it is given none, and is no measure then.
            eager_error, _ = self._error("padded", eager)
        error = largest_of_ranks(self.strategy, difference(self.expected, eager))
        if error <= self.tolerance or not eager_error <= self.tolerance:
            return
        name = self.policy.causal_lm.config._attn_implementation
        log.info(f"{name} attention leaves something out ({self._shown(error)}): using eager attention")
        use_eager_attention(self.policy.causal_lm)
        self.policy.can_share_prefixes = False
        self._measure()

    def first_exact(self, wanted: list[str]) -> str:
        """The first of ``wanted`` that is exact, or ``padded``, which a sequence alone is in every layout.

        Raises:
            UserError: padded rows are not exact either.
        """
        for layout in wanted:
            error, reason = self._error(layout)
            if error <= self.tolerance:
                return layout
            log.info(f"{_FLAGS[layout]}: log-probs are not the model's own ({reason or self._shown(error)}); not used")
        error, reason = self._error("padded")
        if error <= self.tolerance:
            return "padded"
        raise UserError(
            f"{type(self.policy.causal_lm).__name__}: log-probs in padded rows are not the model's own "
            f"({reason or self._shown(error)}); it cannot be trained"
        )

    def _error(self, layout: str, expected: list[torch.Tensor] | None = None) -> tuple[float, str]:
        """Difference of a layout from the model's own log-probs, with gradient checkpointing too where it is on; and
        the exception that it ends in, if any."""
        expected = self.expected if expected is None else expected
        error, reason = 0.0, ""
        try:
            for copies, recomputing in product(
                (1, _COPIES) if layout == "shared" else (1,), (False, True) if _recomputed(self.policy) else (False,)
            ):
                probes = self.probes * copies
                batch = collate(probes, None, self.pad_token_id, layout, every_response_token=True).to(device())
                with torch.no_grad(), _training_path(self.policy, recomputing):
                    rows = self.actor(batch, with_value=False).log_f
                error = max(error, difference(list(rows), expected * copies))
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a model's code may stumble over anything
            if hasattr(next(self.policy.parameters()), "ds_id"):
                raise UserError(
                    f"{_FLAGS.get(layout, 'padded rows')}: the model fails ({_kind_and_line(failure)}), and under "
                    "ZeRO-3 nothing else can be tried after that: turn it off"
                ) from failure
            error, reason = float("inf"), _kind_and_line(failure)
        return largest_of_ranks(self.strategy, error), reason

    def _shown(self, error: float) -> str:
        return f"off by {error:.2g} nats a token, rounding explains {self.tolerance:.2g}"


@contextmanager
def _training_path(policy: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Let layers take their way through gradient checkpointing, without the dropout of training."""
    layers = _recomputed(policy) if wanted else []
    for layer in layers:
        layer.training = True
    try:
        with _NoDropout():
            yield
    finally:
        for layer in layers:
            layer.training = False


def _recomputed(policy: torch.nn.Module) -> list[torch.nn.Module]:
    return [one for one in policy.modules() if getattr(one, "gradient_checkpointing", False)]


class _NoDropout(TorchFunctionMode):
    """Some layers call dropout themselves, as a function of whether they train."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is functional.dropout else function(*args, **(kwargs or {}))


def _kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
