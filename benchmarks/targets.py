"""What is aimed at, and whether a run of ``train_step.py`` reached it. No measuring here."""

from collections.abc import Mapping
from dataclasses import dataclass

ARMS = {
    "pipa": "PIPA (ours)",
    "pipa_prompts": "ours, prompts shared alone",
    "trl_kto": "TRL KTO",
    "trl_dpo": "TRL DPO",
    "openrlhf_dpo": "OpenRLHF DPO",
    "swift_kto": "ms-swift KTO, packed",
    "swift_dpo": "ms-swift DPO, packed",
    "flash_pref": "flash-pref DPO",
}
DATA = {"words": "word problems", "gsm8k": "GSM8K", "trees": "search trees"}


@dataclass(frozen=True)
class Ratio:
    """Cost of another arm / ours: of FLOPs; of medians of seconds, with the least and the most of the rounds'."""

    flops: float
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """The least ratio of ``arm`` on ``data``, in FLOPs and in time.

    Attributes:
        first: of a first pass, ours with its prior pass; else of a later one.
    """

    data: str
    arm: str
    least: float
    first: bool = False


TARGETS = (
    Target("words", "trl_kto", 8.0),
    Target("words", "trl_dpo", 4.5),
    Target("words", "openrlhf_dpo", 5.0),
    Target("words", "swift_kto", 5.0),
    Target("words", "pipa_prompts", 1.8),
    Target("words", "trl_kto", 5.0, first=True),
    Target("words", "trl_dpo", 3.0, first=True),
    Target("words", "openrlhf_dpo", 3.0, first=True),
    Target("words", "pipa_prompts", 1.8, first=True),
    Target("trees", "pipa_prompts", 1.6),
)
# Most counted FLOPs / the least that a forward and backward pass over the distinct tokens takes, see least.py.
MOST_OF_LEAST = {"words": 1.02, "trees": 1.02}


def verdicts(ratios: Mapping[tuple[str, str, bool], Ratio], of_least: Mapping[str, float]) -> list[str]:
    """A line for every target, the last word of which is ``ok`` or ``MISSED``; what was not measured is missed.

    Args:
        ratios: by data, arm and whether it is the first pass.
        of_least: by data, our counted FLOPs / the least.
    """
    lines = []
    for target in TARGETS:
        ratio = ratios.get((target.data, target.arm, target.first))
        what = f"{DATA[target.data]}, {ARMS[target.arm]}, {'first' if target.first else 'later'} pass"
        if ratio is None:
            lines.append(_line(what, "not measured", f">= {target.least}", False))
            continue
        figures = f"FLOPs {ratio.flops:5.2f}  time {ratio.seconds:5.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        lines.append(_line(what, figures, f">= {target.least}", min(ratio.flops, ratio.seconds) >= target.least))
    for data, most in MOST_OF_LEAST.items():
        what, value = f"{DATA[data]}, FLOPs / the least", of_least.get(data)
        figures = "not measured" if value is None else f"{value:.3f}"
        lines.append(_line(what, figures, f"<= {most}", value is not None and value <= most))
    return lines


def _line(what: str, figures: str, target: str, reached: bool) -> str:
    return f"{what:<54} {figures:<40} target {target:<8} {'ok' if reached else 'MISSED'}"
