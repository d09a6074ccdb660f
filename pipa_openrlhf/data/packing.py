"""Units into micro-batches of like work, whatever their order."""

import heapq
import math
from bisect import bisect_right, insort

import numpy as np

# The limit of work is found to this share of it.
PRECISION = 1e-3
# Micro-batches looked at for a unit that has no room for its tokens in the fullest: it bounds the time of large sets.
_TRIES = 8


def pack(tokens: np.ndarray, work: np.ndarray, budget: float, world_size: int) -> list[list[int]]:
    """Places of [num_units] units, micro-batch by micro-batch, in the number that ``budget`` and ranks ask for.

    Args:
        tokens, work: [num_units].
        budget: most tokens of a micro-batch; a larger unit is alone.
        world_size: micro-batches that run at the same time, where the one of most work decides how long.
    """
    fewest = _best_fit(tokens, tokens, budget, budget)
    number = world_size * math.ceil(len(fewest) / world_size)
    # Many units a micro-batch are best spread out, few are best matched: no other unit fills a gap of theirs later.
    found = [_matched(fewest, tokens, work, budget, number), _spread_out(tokens, work, budget, number)]
    return min((parts for parts in found if parts), key=lambda parts: in_step(_sums(work, parts), world_size))


def in_step(work: np.ndarray, world_size: int) -> float:
    """Work that a rank runs or waits for, where ranks run micro-batches of that ``work`` heaviest first."""
    return float(np.sort(work)[::-1][::world_size].sum())


def _sums(values: np.ndarray, parts: list[list[int]]) -> np.ndarray:
    return np.array([values[part].sum() for part in parts])


def _matched(
    fewest: list[list[int]], tokens: np.ndarray, work: np.ndarray, budget: float, number: int
) -> list[list[int]]:
    """The multifit algorithm: the least limit of work with which best fit needs no more than ``number`` parts."""
    parts, low, high = fewest, work.sum() / number, _sums(work, fewest).max()
    while high - low > PRECISION * high:
        limit = (low + high) / 2
        found = _best_fit(work, tokens, limit, budget)
        if len(found) <= number:
            parts, high = found, limit
        else:
            low = limit
    return parts


def _best_fit(load: np.ndarray, tokens: np.ndarray, limit: float, budget: float) -> list[list[int]]:
    """Every unit, that of most ``load`` first, in the fullest part that has room for it."""
    loads, sizes, parts = load.tolist(), tokens.tolist(), list[list[int]]()
    held: list[float] = []
    by_load: list[tuple[float, int]] = []
    for unit in np.argsort(-load, kind="stable").tolist():
        last = bisect_right(by_load, (limit - loads[unit], len(parts))) - 1
        for place in range(last, max(last - _TRIES, -1), -1):
            if held[by_load[place][1]] + sizes[unit] <= budget:
                before, part = by_load.pop(place)
                break
        else:
            before, part = 0.0, len(parts)
            parts.append([])
            held.append(0)
        parts[part].append(unit)
        held[part] += sizes[unit]
        insort(by_load, (before + loads[unit], part))
    return parts


def _spread_out(tokens: np.ndarray, work: np.ndarray, budget: float, number: int) -> list[list[int]] | None:
    """Every unit, that of most work first, in the part of least work; None where one has no room for its tokens."""
    parts: list[list[int]] = [[] for _ in range(number)]
    by_load = [(0.0, 0.0, part) for part in range(number)]
    for unit, load, size in [(unit, work[unit], tokens[unit]) for unit in np.argsort(-work, kind="stable").tolist()]:
        before, held, part = by_load[0]
        if parts[part] and held + size > budget:
            return None
        parts[part].append(unit)
        heapq.heapreplace(by_load, (before + load, held + size, part))
    return parts
