"""Time that ranks wait for each other because their micro-batches differ in work; no model, no processes.

    python benchmarks/balance.py [--seeds 5]

Eight ranks, global batches of 256 answers of lognormal lengths, eight a prompt. At every micro-batch all ranks wait
for the slowest: lost is the sum over micro-batches of (most work of a rank - mean), over the sum of the most. Work is
tokens, those of padding included and shared ones once, plus attention of a 7B model.
"""

import argparse
import time
from statistics import mean, median

import numpy as np
from measure import print_head, print_table

from pipa_openrlhf.data.plan import MOST_PADDING, UnitSizes, cut, global_batches, rank_micro_batches
from pipa_openrlhf.data.prefixes import lexicographic

RANKS, BATCH, PROMPTS, ANSWERS = 8, 256, 128, 8
ATTENTION = 30 * 4096 / 6.07e9  # DeepSeek-Math-7B: layers x hidden size / weights of the backbone
# Mean and deviation of the log of a length, 0.35 of it within a prompt; longest; tokens of a micro-batch.
SHORT, LONG = (5.5, 0.5, 2048, 8192), (7.2, 0.7, 8192, 16384)


def make_sizes(seed: int, layout: str, mu: float, sigma: float, longest: int, _budget: int) -> UnitSizes:
    """Answers that begin like an earlier one of their prompt, up to a place that is anywhere in it."""
    draw = np.random.default_rng(seed)
    sequences: list[np.ndarray] = []
    for prompt in range(PROMPTS):
        middle, text = draw.normal(mu, (sigma**2 - 0.35**2) ** 0.5), draw.integers(0, 30000, 80)
        for answer in range(ANSWERS):
            size = int(np.clip(np.exp(draw.normal(middle, 0.35)), 16, longest - 80))
            ids = np.concatenate([text, draw.integers(0, 30000, size)])
            if answer:
                earlier = sequences[prompt * ANSWERS + draw.integers(answer)]
                same = 80 + int(draw.random() * (min(len(earlier), len(ids)) - 80))
                ids[:same] = earlier[:same]
            sequences.append(ids)
    prompts, lengths = np.repeat(np.arange(PROMPTS), ANSWERS), np.array(list(map(len, sequences)))
    return UnitSizes(lengths, prompts, layout, lambda units: [sequences[unit] for unit in units], 1, ATTENTION)


def tokens_and_work(units: np.ndarray, sizes: UnitSizes) -> tuple[float, float]:
    """Of one micro-batch, by their definition."""
    if not len(units):
        return 0.0, 0.0
    lengths = sizes.lengths[units].astype(np.float64)
    if sizes.layout == "packed":
        return lengths.sum(), lengths.sum() + ATTENTION * (lengths**2).sum()
    padded = len(lengths) * lengths.max()
    distinct = lengths.sum() - sum(lexicographic(sizes.sequences_of(units))[1])
    tokens = padded if sizes.layout == "padded" else distinct
    return tokens, tokens + ATTENTION * padded * lengths.max()


def planned(batch: np.ndarray, *more) -> list[np.ndarray]:
    """Micro-batches of all ranks, those that run at the same time side by side."""
    of_ranks = [rank_micro_batches(batch, rank, RANKS, *more) for rank in range(RANKS)]
    return [units for together in zip(*of_ranks) for units in together]


def by_tokens(batch: np.ndarray, sizes: UnitSizes, budget: int) -> list[np.ndarray]:
    """Stretches of the line with the fewest tokens a micro-batch, in its order."""
    line = sizes.line_up(batch)
    number = -(-len(cut(line, budget)) // RANKS) * RANKS
    while True:
        low, high = 1, budget
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(line, middle)) <= number else (middle + 1, high)
        parts = [line.units[part] for part in cut(line, high)]
        tokens = sum(len(part) * sizes.lengths[part].max() for part in parts)
        if sizes.layout != "padded" or 1 - sizes.lengths[batch].sum() / tokens <= MOST_PADDING:
            return parts + [batch[:0]] * (-len(parts) % RANKS)
        number += RANKS


ARMS = {  # the first as many a micro-batch as always fit
    "upstream order": lambda batch, sizes, budget: planned(batch, max(budget // sizes.longest, 1)),
    "tokens balanced": by_tokens,
    "work balanced": lambda batch, sizes, budget: planned(batch, 1, sizes, budget),
}


def measure(arm: str, layout: str, shape: tuple, seed: int) -> tuple[float, float, float]:
    """Of an epoch: % of the time lost, % of tokens that are padding, micro-batches of a rank a step."""
    sizes = make_sizes(seed, layout, *shape)
    batches = global_batches(PROMPTS * ANSWERS, BATCH, seed, 0, None if arm == "upstream order" else sizes.prompts)
    plans = [[tokens_and_work(units, sizes) for units in ARMS[arm](batch, sizes, shape[-1])] for batch in batches]
    tokens, work = np.concatenate(plans).reshape(-1, RANKS, 2).transpose(2, 0, 1)
    most = work.max(axis=1)
    padding = 1 - sizes.lengths.sum() / tokens.sum() if layout == "padded" else 0.0
    return 100 * (1 - work.mean(axis=1).sum() / most.sum()), 100 * padding, len(most) / len(batches)


def planning_seconds(seed: int) -> float:
    """Of a global batch of 256 answers of about 300 tokens, eight a prompt, in the shared layout."""
    sizes = make_sizes(seed, "shared", *SHORT)
    batch = global_batches(PROMPTS * ANSWERS, BATCH, seed, 0, sizes.prompts)[0]
    started = time.perf_counter()
    rank_micro_batches(batch, 0, RANKS, 1, sizes, SHORT[-1])
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print_head()
    for shape in (SHORT, LONG):
        print("\nmu {}, sigma {}, at most {} tokens; micro-batches of {}".format(*shape))
        rows = []
        for layout, arm in ((layout, arm) for layout in ("packed", "padded", "shared") for arm in ARMS):
            lost, padding, number = zip(*(measure(arm, layout, shape, seed) for seed in seeds))
            spread = f"{mean(lost):.1f} ({min(lost):.1f}-{max(lost):.1f})"
            rows.append([f"{layout}, {arm}", spread, f"{mean(padding):.1f}", f"{mean(number):.1f}"])
        print_table(["", "% lost", "% padding", "micro-batches"], rows)
    seconds = sorted(map(planning_seconds, seeds))
    print(f"\nplanning a global batch: {median(seconds):.4f} s ({seconds[0]:.4f}-{seconds[-1]:.4f})")
