"""How well g tells right steps from wrong ones: first-error detection, AUC, calibration.

A step's value is read at two places. ``after``: g after its last token, as search reads it; it has seen the whole
step, and was trained to judge what comes next. ``last``: g of its last token, which was trained on the step's own
label, from the state before that token: what it has not seen is that token, most often a line end. Of the last step of
a whole answer both are the g that predicted the answer's end.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipa_openrlhf.data.samples import Sample
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.value_model import ValueModel

READINGS = ("after", "last")
_BINS = 10
_RESAMPLES = 2_000
_THRESHOLDS = 201


@dataclass(frozen=True)
class Judged:
    """The labelled steps of one answer.

    Attributes:
        steps: [S] their numbers in the answer, from 0.
        labels: [S] 1 right, 0 wrong.
        values: by reading, [S] g.
    """

    where: str
    problem_id: str
    steps: np.ndarray
    labels: np.ndarray
    values: dict[str, np.ndarray]


def judge(value_model: ValueModel, samples: Sequence[Sample], eos_token_id: int) -> list[Judged]:
    """The value of every labelled step of ``samples``."""
    values = value_model.token_values([sample.input_ids.tolist() for sample in samples])
    return [_judged(sample, after, eos_token_id) for sample, after in zip(samples, values)]


def _judged(sample: Sample, after_token: np.ndarray, eos_token_id: int) -> Judged:
    """Args: after_token: [prompt_len + T] g after each token."""
    steps, labels, places = [], [], []
    for step in np.unique(sample.step_ids[sample.mask == 1]):
        inside = np.flatnonzero(sample.step_ids == step)
        labelled = inside[sample.mask[inside] == 1]
        end, last = sample.prompt_len + inside[-1], sample.prompt_len + labelled[-1]
        is_end_of_answer = end == len(sample.input_ids) - 1 and sample.input_ids[end] == eos_token_id
        steps.append(step)
        labels.append(sample.labels[labelled[-1]])
        places.append((end - 1 if is_end_of_answer else end, last - 1))
    values = {name: after_token[[place[at] for place in places]] for at, name in enumerate(READINGS)}
    return Judged(sample.where, sample.problem_id, np.array(steps), np.array(labels), values)


def first_below(values: np.ndarray, threshold: float) -> int | None:
    """Index of the first of ``values`` that is below ``threshold``; None where none is."""
    below = np.flatnonzero(values < threshold)
    return int(below[0]) if len(below) else None


def detection(answers: Sequence[Judged], reading: str, threshold: float) -> dict:
    """First-error detection as ProcessBench (arXiv 2412.06559) scores it.

    The first step below ``threshold`` is called the first wrong one. ``erroneous``: of the answers with a wrong step,
    the share in which that is the one; ``correct``: of the others, the share in which no step is called wrong; ``f1``:
    their harmonic mean. None where there is no such answer. Intervals are bootstraps over problems.
    """
    problems: dict[str, np.ndarray] = {}
    for answer in answers:
        actual = first_below(answer.labels, 1)
        is_found = first_below(answer.values[reading], threshold) == actual
        counts = problems.setdefault(answer.problem_id, np.zeros((2, 2)))  # erroneous, correct x found, all
        counts[int(actual is None)] += (is_found, 1)
    counts = np.array(list(problems.values()))
    drawn = np.random.default_rng(0).integers(0, len(counts), (_RESAMPLES, len(counts)))
    resampled = np.array([counts[rows].sum(0) for rows in drawn])
    result: dict = {"threshold": threshold}
    for at, name in enumerate(("erroneous", "correct", "f1")):
        value, values = _accuracies(counts.sum(0)[None])[at][0], _accuracies(resampled)[at]
        seen = values[~np.isnan(values)]
        is_known = not np.isnan(value)
        result[name] = float(value) if is_known else None
        result[f"{name}_interval_95"] = np.quantile(seen, (0.025, 0.975)).tolist() if is_known else None
    (_, result["n_erroneous"]), (_, result["n_correct"]) = counts.sum(0).astype(int).tolist()
    return result


def _accuracies(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, erroneous or correct, found or all] counts -> [R] each: both accuracies, and their harmonic mean."""
    with np.errstate(divide="ignore", invalid="ignore"):
        erroneous, correct = (counts[:, :, 0] / counts[:, :, 1]).T
        f1 = np.where(erroneous + correct == 0, 0.0, 2 * erroneous * correct / (erroneous + correct))
    return erroneous, correct, f1


def best_threshold(answers: Sequence[Judged], reading: str) -> float:
    """The threshold of highest F1 on ``answers``, of evenly spread quantiles of their values.

    Of equal ones the lowest. Where F1 is undefined, the one that finds most.
    """
    values = np.concatenate([answer.values[reading] for answer in answers])
    firsts = [first_below(answer.labels, 1) for answer in answers]
    best, best_score = 0.5, -1.0
    for threshold in np.unique(np.quantile(values, np.linspace(0, 1, _THRESHOLDS))):
        counts = np.zeros((1, 2, 2))
        for answer, actual in zip(answers, firsts):
            is_found = first_below(answer.values[reading], threshold) == actual
            counts[0, int(actual is None)] += (is_found, 1)
        erroneous, correct, f1 = (float(one[0]) for one in _accuracies(counts))
        score = f1 if not np.isnan(f1) else float(np.nanmax([erroneous, correct]))
        if score > best_score:
            best, best_score = float(threshold), score
    return best


def halves(answers: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Two halves, by problem, whatever their order: one to choose by, the other to report."""
    sides: tuple[list[Judged], list[Judged]] = ([], [])
    for answer in answers:
        sides[hashlib.sha256(answer.problem_id.encode()).digest()[0] % 2].append(answer)
    return sides


def pooled(answers: Sequence[Judged], reading: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and labels of all steps."""
    return np.concatenate([one.values[reading] for one in answers]), np.concatenate([one.labels for one in answers])


def auc(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Probability that a right step has a higher value than a wrong one, half of it where they are equal.

    None where all steps are right, or all wrong.
    """
    right, wrong = values[labels == 1], np.sort(values[labels == 0])
    if not len(right) or not len(wrong):
        return None
    below = np.searchsorted(wrong, right, side="left").mean()
    below_or_equal = np.searchsorted(wrong, right, side="right").mean()
    return float((below + below_or_equal) / 2 / len(wrong))


def calibration(values: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Ten bins of equal width, those with steps in them: how many, their mean value, and the share that is right."""
    numbers = np.minimum((values * _BINS).astype(int), _BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        bins.append(
            {
                "from": number / _BINS,
                "to": (number + 1) / _BINS,
                "n": int(inside.sum()),
                "mean_value": float(values[inside].mean()),
                "share_right": float(labels[inside].mean()),
            }
        )
    return bins


def calibration_error(bins: list[dict]) -> float:
    """Mean over steps of the distance between the mean value of their bin and the share that is right there."""
    total = sum(one["n"] for one in bins)
    return sum(one["n"] * abs(one["mean_value"] - one["share_right"]) for one in bins) / total


def summarise(answers: Sequence[Judged], threshold: float, choose_threshold: bool) -> dict:
    """Everything about the values of ``answers``, by reading.

    Args:
        choose_threshold: the threshold is the best one on one half of the problems, and the other half is reported.

    Raises:
        UserError: one half has too few problems.
    """
    chosen_by, reported = halves(answers) if choose_threshold else ([], list(answers))
    if choose_threshold and min(len({one.problem_id for one in half}) for half in (chosen_by, reported)) < 2:
        raise UserError("--quality.choose_threshold needs several problems in each half: give more data")
    summary: dict = {"answers": len(reported), "steps": sum(len(one.labels) for one in reported), "readings": {}}
    for reading in READINGS:
        values, labels = pooled(reported, reading)
        bins = calibration(values, labels)
        used = best_threshold(chosen_by, reading) if choose_threshold else threshold
        summary["right_steps"] = int(labels.sum())
        summary["readings"][reading] = {
            "auc": auc(values, labels),
            "brier": float(((values - labels) ** 2).mean()),
            "calibration_error": calibration_error(bins),
            "detection": detection(reported, reading, used),
            "calibration": bins,
        }
    return summary
