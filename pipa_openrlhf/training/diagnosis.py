"""Why a run is flat: the usual causes, where its metrics show them.

Each rule looks at the rows of ``metrics.jsonl``, whose keys docs/method.md explains. A rule that is about where a run
leads compares its first steps with its last ones, and says nothing of a run of fewer than ``MIN_STEPS`` steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MIN_STEPS = 20
_NEARLY_ALL = 0.95  # of the steps
_CLIPPED_TOKENS = 0.1  # of the wrong tokens
_AS_PRIOR = 0.05  # nats an answer
_FALL = 1.0  # nats an answer
_FLAT_LOSS = 0.02  # of the first steps' loss
_AT_CHANCE = 0.505  # an untrained value head is at 0.5


class Finding(NamedTuple):
    """A cause, the numbers that show it, and what to do about it: one line each."""

    cause: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.evidence}. {self.remedy}"


def diagnose(rows: Sequence[Mapping], settings: Mapping) -> list[Finding]:
    """What may be wrong with a run; an empty list where its numbers look healthy.

    Args:
        rows: one an optimizer step, as in ``metrics.jsonl``.
        settings: flags by their dotted names, as in ``args.json``; a rule that needs one that is missing is left out.
    """
    untrained = _nothing_trained(rows)
    # What else such a run shows follows from that.
    rules = (_equal_labels,) if untrained else _RULES
    found = [untrained, *(rule(rows, settings) for rule in rules)]
    return [one for one in found if one is not None]


def _nothing_trained(rows: Sequence[Mapping]) -> Finding | None:
    if not rows or any(row["lr"] and row["grad_norm"] for row in rows):
        return None
    without_rate = sum(not row["lr"] for row in rows)
    evidence = f"the learning rate is 0 at {without_rate} of {len(rows)} steps, and the gradient at the others"
    if without_rate == len(rows):
        evidence = f"the learning rate is 0 at all {len(rows)} steps"
    return Finding(
        "Nothing was trained",
        evidence,
        "Give --adam.lr above 0; where a run is so short that it is all warm-up, --lr_warmup_ratio 0 or more data",
    )


def _only_warm_up(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    rates = [row["lr"] for row in rows]
    if len(rates) < 3 or not all(earlier < later for earlier, later in zip(rates, rates[1:])):
        return None
    return Finding(
        "The schedule never left warm-up",
        f"the learning rate rises at every step, from {rates[0]:.3g} to {rates[-1]:.3g} at step {rows[-1]['step']}",
        "Lower --lr_warmup_ratio, or train for more steps",
    )


def _equal_labels(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    shares = set(_numbers(rows, "right_token_share"))
    if len(shares) != 1 or not shares <= {0.0, 1.0} or not _has_prior(rows):
        return None
    label = "right" if shares == {1.0} else "wrong"
    return Finding(
        "Every label is equal",
        f"all labelled tokens of all {len(rows)} steps are {label}",
        "There is nothing to tell apart: look at the labels (cli.inspect_data with the same --data flags), and mix "
        "right and wrong answers",
    )


def _idle_reference_point(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    points = _numbers(rows, "kl")
    zeros = sum(point == 0 for point in points)
    if len(points) < MIN_STEPS or zeros < _NEARLY_ALL * len(points):
        return None
    return Finding(
        "KTO's reference point z0 is stuck at 0",
        f"kl is 0 at {zeros} of {len(points)} steps",
        "The policy likes answers to other problems no better than the prior does: harmless while rewards/margins "
        "grows; else a smaller --adam.lr, and data of more than one problem_id",
    )


def _clipped_tokens(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    shares = _numbers(rows, "pipa/clip_fraction")
    share = _mean(_late(shares)) if shares else 0.0
    if share <= _CLIPPED_TOKENS:
        return None
    return Finding(
        "Many wrong tokens are clipped",
        f"pipa/clip_fraction is {share:.2f} over the last {len(_late(shares))} steps",
        "A clipped token has no gradient: a smaller --adam.lr, a prior that is closer to the policy, or "
        "--pipa.variant n, which clips nothing",
    )


def _equal_to_prior(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    ratios = [_numbers(rows, key) for key in ("logratio/chosen", "logratio/rejected")]
    late = [abs(value) for values in ratios if values for value in _late(values)]
    if len(rows) < MIN_STEPS or not late or max(late) > _AS_PRIOR:
        return None
    return Finding(
        "The policy is still its prior",
        f"after {len(rows)} steps no batch's mean log-ratio is further than {max(late):.2g} nats an answer from 0",
        "Give a higher --adam.lr, or train for more steps",
    )


def _falling_together(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    ratios = [_numbers(rows, key) for key in ("logratio/chosen", "logratio/rejected")]
    if min(map(len, ratios)) < MIN_STEPS:
        return None
    chosen, rejected = (_mean(_late(values)) - _mean(_early(values)) for values in ratios)
    if max(chosen, rejected) > -_FALL:
        return None
    return Finding(
        "Right answers fall with the wrong ones",
        f"logratio/chosen went down by {-chosen:.1f} nats an answer, logratio/rejected by {-rejected:.1f}",
        "Give a smaller --adam.lr, a term that holds right answers up (--pipa.sft_coef, --kto.sft_coef, "
        "--model.nll_loss_coef), or step labels, which spare the right beginning of a wrong answer",
    )


def _clipped_gradient(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    limit = settings.get("max_norm") or math.inf
    norms, losses = _numbers(rows, "grad_norm"), _numbers(rows, "loss")
    clipped = sum(norm > limit for norm in norms)
    if min(len(norms), len(losses)) < MIN_STEPS or clipped < _NEARLY_ALL * len(norms):
        return None
    # A sum over tokens has large gradients, and Adam does not mind: this matters only where nothing is learned.
    before, after = _mean(_early(losses)), _mean(_late(losses))
    if before - after > _FLAT_LOSS * abs(before):
        return None
    return Finding(
        "The gradient is clipped at nearly every step, and the loss does not fall",
        f"grad_norm is above --max_norm {limit:g} at {clipped} of {len(norms)} steps, its median is "
        f"{_median(norms):.3g}; the loss went from {before:.4g} to {after:.4g}",
        "Every batch moves the weights equally far, however little it says: a larger --train.batch_size, a higher "
        "--max_norm, or --pipa.loss_reduction token_mean",
    )


def _value_at_chance(rows: Sequence[Mapping], settings: Mapping) -> Finding | None:
    values = _numbers(rows, "pipa/value_likelihood")
    if len(values) < MIN_STEPS or "pipa.fixed_value" not in settings or settings["pipa.fixed_value"] is not None:
        return None
    late = _mean(_late(values))
    if late > _AT_CHANCE:
        return None
    return Finding(
        "The value head is at chance",
        f"pipa/value_likelihood is {late:.3f} over the last {len(_late(values))} steps; untrained it is 0.500",
        "Give the head a higher learning rate (--value.lr, ten times the policy's, say), or step labels: whether a "
        "whole answer will be right can often not be told from its beginning",
    )


_RULES: tuple[Callable[[Sequence[Mapping], Mapping], Finding | None], ...] = (
    _only_warm_up,
    _equal_labels,
    _equal_to_prior,
    _falling_together,
    _idle_reference_point,
    _clipped_tokens,
    _clipped_gradient,
    _value_at_chance,
)


def _has_prior(rows: Sequence[Mapping]) -> bool:
    """Whether the objective compares with a prior; SFT has right answers alone, and wants no others."""
    return any("logratio/chosen" in row for row in rows)


def _numbers(rows: Sequence[Mapping], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _window(values: Sequence[float]) -> int:
    return max(1, len(values) // 5)


def _early(values: Sequence[float]) -> Sequence[float]:
    return values[: _window(values)]


def _late(values: Sequence[float]) -> Sequence[float]:
    return values[-_window(values) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
