"""Scores of graded answers: accuracy, majority vote, pass@k, their intervals, and the test of two evaluations."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # numbers in memory while resampling
_NORMAL_QUANTILE_975 = 1.959963984540054

Rows = list[dict]


def by_problem(rows: Rows) -> dict[str, Rows]:
    """The rows of each problem; no score depends on their order."""
    problems: dict[str, Rows] = {}
    for row in rows:
        problems.setdefault(row["problem_id"], []).append(row)
    return problems


def verdicts(rows: Rows) -> dict[str, bool]:
    """One a problem: whether its answer is right, or where it has several the one that most of them give."""
    return {key: majority_is_right(of_problem) for key, of_problem in by_problem(rows).items()}


def majority_is_right(rows: Rows) -> bool:
    """Whether the most frequent answer to one problem is right.

    Of equally frequent ones that which was given first counts. Rows without an answer have no vote; where none has one
    the problem is not solved.
    """
    if len(rows) == 1:
        return bool(rows[0]["right"])
    votes = Counter(row["vote"] for row in rows if row["vote"] is not None)
    if not votes:
        return False
    winner = min(votes, key=lambda vote: (-votes[vote], vote))
    return any(row["right"] for row in rows if row["vote"] == winner)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of ``k`` answers is right, drawn without replacement from ``n`` of which ``right`` are.

    Unbiased for the probability that one of ``k`` new answers is right (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def scores_of(rows: Rows) -> dict[str, list[float]]:
    """Name of a score to its value on each problem; with several answers also ``maj@n`` and ``pass@k``."""
    problems = list(by_problem(rows).values())
    n = max(map(len, problems))
    rights = [sum(bool(row["right"]) for row in of_problem) for of_problem in problems]
    scores = {"accuracy": [right / n for right in rights]}
    if n > 1:
        scores[f"maj@{n}"] = [float(majority_is_right(of_problem)) for of_problem in problems]
        ks = [*(1 << power for power in range(1, n.bit_length()) if 1 << power < n), n]
        scores |= {f"pass@{k}": [pass_at_k(n, right, k) for right in rights] for k in ks}
    return scores


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values``, which are one a problem; the same at every call."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0)
    at_once = max(1, _AT_ONCE // len(array))
    means = []
    for start in range(0, _RESAMPLES, at_once):
        size = (min(at_once, _RESAMPLES - start), len(array))
        means.append(array[draws.integers(0, len(array), size)].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen as ``successes`` out of ``n``."""
    z = _NORMAL_QUANTILE_975
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test of the problems that one alone of two evaluations has right."""
    n = only_first + only_second
    tail = sum(math.comb(n, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
