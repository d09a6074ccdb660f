"""Results of an evaluation: rows, one a graded answer, with the answers to one problem told apart for the vote; their
scores, the intervals of these and the test of two evaluations; and a summary.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.grading import Grader, committed_answer, grader_name

if TYPE_CHECKING:
    from pipa_openrlhf.generate.job import MakeRows
    from pipa_openrlhf.generate.problems import Problem
    from pipa_openrlhf.generate.sampling import Answer

RESULTS_FILE = "results.jsonl"
SUMMARY_FILE = "summary.json"
BREAKDOWNS = ("level", "type")

_RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # numbers in memory while resampling
_NORMAL_QUANTILE_975 = 1.959963984540054

Rows = list[dict]


def summarise(rows: list[dict], description: dict) -> dict:
    """What was evaluated how, and its scores.

    ``accuracy`` is over answers. Its ``interval_95`` is Wilson's where each problem has one answer; answers to one
    problem depend on each other, so with several it is a bootstrap over problems, as those of ``scores`` always are.
    """
    n = len({row["problem_id"] for row in rows})
    right = sum(row["right"] for row in rows)
    scores = [_score(name, values) for name, values in scores_of(rows).items()]
    for column in BREAKDOWNS:
        scores += _breakdown(rows, column)
    return {
        "accuracy": right / len(rows),
        "interval_95": list(wilson_interval(right, n)) if n == len(rows) else scores[0]["interval_95"],
        "right": right,
        "n": n,
        "answers": len(rows),
        "no_answer": sum(row["predicted"] is None for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
        "scores": scores,
        **description,
    }


def _score(name: str, values: list[float], **group: str) -> dict:
    interval = list(bootstrap_interval(values))
    return {"score": name, **group, "n": len(values), "value": sum(values) / len(values), "interval_95": interval}


def _breakdown(rows: list[dict], column: str) -> list[dict]:
    """The scores of each value of a column, where the problems have it."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if column in row:
            groups.setdefault(row[column], []).append(row)
    return [
        _score(name, values, **{column: group})
        for group, of_group in sorted(groups.items())
        for name, values in scores_of(of_group).items()
    ]


def headline(summary: dict) -> dict:
    """The score by which evaluations are compared: accuracy, or with several answers the majority vote's."""
    n = summary.get("answers", summary["n"]) // summary["n"]
    if n == 1:
        return {"score": "accuracy", "value": summary["accuracy"], "interval_95": summary["interval_95"]}
    return next(score for score in summary["scores"] if score["score"] == f"maj@{n}")


def one_line(summary: dict) -> str:
    low, high = summary["interval_95"]
    answers = f"{summary['right']} of {summary['answers']}"
    if summary["answers"] != summary["n"]:
        answers += f" answers to {summary['n']} problems"
    text = (
        f"accuracy {summary['accuracy']:.1%} ({answers}), "
        f"95 % interval {low:.1%} to {high:.1%}; {summary['no_answer']} without an answer"
    )
    return f"{text}; graded by {summary['grader']}" if "grader" in summary else text


def score_table(summary: dict) -> str | None:
    """A line a score and group; None where there is accuracy alone, which ``one_line`` tells."""
    scores = summary["scores"]
    if len(scores) == 1:
        return None
    rows: list[tuple[str, ...]] = [("problems", "score", "n", "value", "95 % interval (bootstrap)")]
    for score in scores:
        low, high = score["interval_95"]
        group = next((f"{column} {score[column]}" for column in BREAKDOWNS if column in score), "all")
        interval = f"{low:.1%} to {high:.1%}"
        rows.append(
            (group.replace("level Level", "level"), score["score"], str(score["n"]), f"{score['value']:.1%}", interval)
        )
    return f"{text_table(rows)}\n\nGraded by {summary['grader']}."


def text_table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_summary(folder: str, summary: dict) -> None:
    """Written in one go: the file is there only once the evaluation is complete."""
    path = os.path.join(folder, SUMMARY_FILE)
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.unfinished", path)


def read_summary(folder: str) -> dict:
    """Summary of a finished evaluation.

    Raises:
        UserError: the folder holds none.
    """
    path = os.path.join(folder, SUMMARY_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no summary of a finished evaluation there; run pipa_openrlhf.cli.evaluate"
        ) from error


def read_results(folder: str) -> list[dict]:
    """Rows of an evaluation.

    Raises:
        UserError: the folder holds none.
    """
    path = os.path.join(folder, RESULTS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the results of an evaluation ({error})") from error


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


def weighted_majority_is_right(rows: Rows) -> bool:
    """Whether that answer to one problem is right whose rows have the largest sum of values; of equal ones the first.

    Rows without an answer have no vote.
    """
    weights: Counter[int] = Counter()
    for row in rows:
        if row["vote"] is not None:
            weights[row["vote"]] += row["value"]
    if not weights:
        return False
    winner = min(weights, key=lambda vote: (-weights[vote], vote))
    return any(row["right"] for row in rows if row["vote"] == winner)


def best_is_right(rows: Rows) -> bool:
    """Whether the row of highest value is right, of the rows to one problem that give an answer.

    Of equal ones the first counts.
    """
    answered = [row for row in rows if row["vote"] is not None]
    return bool(answered) and bool(max(answered, key=lambda row: (row["value"], -row["sample"]))["right"])


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of ``k`` answers is right, drawn without replacement from ``n`` of which ``right`` are.

    Unbiased for the probability that one of ``k`` new answers is right (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def scores_of(rows: Rows) -> dict[str, list[float]]:
    """Name of a score to its value on each problem; with several answers also ``maj@n`` and ``pass@k``, and where they
    were judged ``weighted maj@n`` and ``best-of-n``."""
    problems = list(by_problem(rows).values())
    n = max(map(len, problems))
    rights = [sum(bool(row["right"]) for row in of_problem) for of_problem in problems]
    scores = {"accuracy": [right / n for right in rights]}
    if n > 1:
        scores[f"maj@{n}"] = [float(majority_is_right(of_problem)) for of_problem in problems]
        if all("value" in row for row in rows):
            scores[f"weighted maj@{n}"] = [float(weighted_majority_is_right(of_problem)) for of_problem in problems]
            scores[f"best-of-{n}"] = [float(best_is_right(of_problem)) for of_problem in problems]
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


def row_maker(grader: Grader) -> "MakeRows":
    """From problems and their answers to rows of ``results.jsonl``."""

    def make_rows(answered: "list[tuple[Problem, list[Answer]]]") -> list[list[dict]]:
        predicted = [[committed_answer(one.text, one.finished) for one in answers] for _, answers in answered]
        pairs = [(one, problem.answer) for (problem, _), ones in zip(answered, predicted) for one in ones]
        flat = iter(grader.same(pairs))
        rights = [[next(flat) for _ in answers] for _, answers in answered]
        votes = _votes(grader, predicted, rights)
        return [
            [_row(problem, *one) for one in zip(answers, ones, of_problem, of_votes)]
            for (problem, answers), ones, of_problem, of_votes in zip(answered, predicted, rights, votes)
        ]

    return make_rows


def _row(problem: "Problem", answer: "Answer", predicted: str | None, right: bool, vote: int | None) -> dict:
    return {
        "right": right,
        "predicted": predicted,
        "vote": vote,
        "answer": problem.answer,
        **{name: value for name, value in (("level", problem.level), ("type", problem.type)) if value is not None},
        "question": problem.question,
        "completion": answer.text,
        "finished": answer.finished,
        "num_tokens": answer.num_tokens,
        **({} if answer.value is None else {"value": answer.value}),
        "grader": grader_name(),
    }


def _votes(grader: Grader, predicted: list[list[str | None]], rights: list[list[bool]]) -> list[list[int | None]]:
    """For each answer the number of the first one to the same problem that says the same; None for no answer.

    Right answers all equal the gold answer. Wrong ones are compared with each other, so that a wrong answer written in
    two ways has both its votes too.
    """
    wrong = [
        list(dict.fromkeys(one for one, right in zip(ones, of_problem) if one is not None and not right))
        for ones, of_problem in zip(predicted, rights)
    ]
    pairs = list({(later, earlier) for ones in wrong for at, later in enumerate(ones) for earlier in ones[:at]})
    same = {pair for pair, equal in zip(pairs, grader.same(pairs)) if equal}
    return [_votes_of_problem(ones, of_problem, same) for ones, of_problem in zip(predicted, rights)]


def _votes_of_problem(predicted: list[str | None], rights: list[bool], same: set[tuple[str, str]]) -> list[int | None]:
    firsts: list[int] = []
    votes: list[int | None] = []

    def is_same(number: int, first: int) -> bool:
        one, other = predicted[number], predicted[first]
        return rights[number] == rights[first] and (rights[number] or one == other or (one, other) in same)

    for number, one in enumerate(predicted):
        if one is None:
            votes.append(None)
            continue
        vote = next((first for first in firsts if is_same(number, first)), number)
        if vote == number:
            firsts.append(number)
        votes.append(vote)
    return votes
