"""Scores against values worked out by hand, and the rows that they are made of."""

import math

import pytest

from pipa_openrlhf.evaluate.grading import Grader
from pipa_openrlhf.evaluate.results import (
    best_is_right,
    bootstrap_interval,
    headline,
    majority_is_right,
    mcnemar_p,
    one_line,
    pass_at_k,
    row_maker,
    score_table,
    scores_of,
    summarise,
    verdicts,
    weighted_majority_is_right,
)
from pipa_openrlhf.generate.problems import Problem
from pipa_openrlhf.generate.sampling import Answer


def answer_rows(problem_id, *answers, **columns):
    """``answers`` are ``(vote, right)``, one a sample."""
    return [
        {
            "problem_id": problem_id,
            "sample": number,
            "right": right,
            "predicted": None if vote is None else str(vote),
            "vote": vote,
            "finished": True,
            **columns,
        }
        for number, (vote, right) in enumerate(answers)
    ]


@pytest.mark.parametrize(
    "n, right, k, share",
    [
        (4, 2, 1, 1 / 2),
        (4, 2, 2, 5 / 6),  # of the 6 pairs one holds no right answer
        (4, 2, 3, 1),  # three of four answers hold a right one
        (4, 2, 4, 1),
        (8, 1, 4, 1 / 2),
        (4, 0, 4, 0),
        (4, 4, 1, 1),
    ],
)
def test_pass_at_k(n, right, k, share):
    assert pass_at_k(n, right, k) == pytest.approx(share)


@pytest.mark.parametrize(
    "answers, right",
    [
        ([(0, True), (1, False), (0, True)], True),
        ([(0, True), (1, False), (1, False)], False),
        ([(0, False), (1, True)], False),  # a tie goes to the first
        ([(0, True), (1, False)], True),
        ([(None, False), (None, False), (2, True)], True),  # no answer, no vote
        ([(None, False), (None, False)], False),
    ],
)
def test_majority(answers, right):
    assert majority_is_right(answer_rows("1", *answers)) is right


def test_one_answer_is_its_own_majority():
    assert verdicts([{"problem_id": "a", "right": True}, {"problem_id": "b", "right": False}]) == {
        "a": True,
        "b": False,
    }


def test_scores_of_several_answers():
    rows = [
        *answer_rows("a", (0, True), (1, False), (0, True), (None, False)),
        *answer_rows("b", (0, False), (0, False), (2, True), (0, False)),
    ]
    scores = scores_of(rows[::-1])  # in any order
    assert list(scores) == ["accuracy", "maj@4", "pass@2", "pass@4"]
    assert scores["accuracy"] == [0.25, 0.5] and scores["maj@4"] == [0, 1]
    assert scores["pass@2"] == pytest.approx([1 / 2, 5 / 6]) and scores["pass@4"] == [1, 1]


def test_pass_at_n_is_told_also_where_n_is_no_power_of_two():
    rows = answer_rows("a", *[(0, True)] * 6)
    assert list(scores_of(rows)) == ["accuracy", "maj@6", "pass@2", "pass@4", "pass@6"]


def test_bootstrap_interval():
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0)
    # the mean of 400 draws of 0 and 1 has standard error sqrt(0.25 / 400) = 0.025
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)
    assert bootstrap_interval([0.0, 1.0] * 200) == (low, high)


@pytest.mark.parametrize(
    "only_first, only_second, p",
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),
        (10, 30, 2 * sum(math.comb(40, i) for i in range(11)) / 2**40),
    ],
)
def test_mcnemar(only_first, only_second, p):
    assert mcnemar_p(only_first, only_second) == pytest.approx(p)


def test_summary_with_levels_and_types():
    rows = [
        *answer_rows("a", (0, True), level="Level 1", type="Algebra"),
        *answer_rows("b", (0, False), level="Level 1", type="Geometry"),
        *answer_rows("c", (0, True), level="Level 5"),
    ]
    summary = summarise(rows, {"grader": "g 1"})
    found = [(one.get("level"), one.get("type"), one["n"], one["value"]) for one in summary["scores"]]
    assert found == [
        (None, None, 3, pytest.approx(2 / 3)),
        ("Level 1", None, 2, 0.5),
        ("Level 5", None, 1, 1.0),
        (None, "Algebra", 1, 1.0),
        (None, "Geometry", 1, 0.0),
    ]
    lines = score_table(summary).splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == [
        "all",
        "level 1",
        "level 5",
        "type Algebra",
        "type Geometry",
    ]
    assert lines[-1] == "Graded by g 1."
    assert headline(summary)["value"] == pytest.approx(2 / 3) and one_line(summary).endswith("graded by g 1")


def test_summary_of_several_answers():
    rows = [*answer_rows("a", (0, True), (0, True), (2, False)), *answer_rows("b", (0, False), (1, True), (0, False))]
    summary = summarise(rows, {"grader": "g 1"})
    assert (summary["accuracy"], summary["right"], summary["n"], summary["answers"]) == (0.5, 3, 2, 6)
    assert summary["interval_95"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]  # both problems are one or the other
    assert headline(summary) == summary["scores"][1] and summary["scores"][1]["score"] == "maj@3"
    assert "(3 of 6 answers to 2 problems)" in one_line(summary)
    assert score_table(summarise(answer_rows("a", (0, True)), {"grader": "g 1"})) is None


def test_rows_tell_answers_apart():
    """Right answers are one, however they are written; so are wrong ones, and a cut-off line is no answer."""
    texts = ["#### 0.5", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{4}}", "#### 0.25", "#### 3", "so", "a\n#### 0.5"]
    answers = [Answer(text, finished=number < 6, num_tokens=3) for number, text in enumerate(texts)]
    other = [Answer("#### x + 1", True, 3), Answer("#### 1 + x", True, 3), Answer("#### y", True, 3)]
    problems = [Problem("p", "half?", r"\frac{1}{2}", None, "Level 2"), Problem("q", "?", "y", None)]
    with Grader(processes=1) as grader:
        first, second = row_maker(grader)([(problems[0], answers), (problems[1], other)])
    assert [row["right"] for row in first] == [True, True, False, False, False, False, False]
    assert [row["vote"] for row in first] == [0, 0, 2, 2, 4, None, None]
    assert first[0]["level"] == "Level 2" and "type" not in first[0] and "level" not in second[0]
    assert [(row["right"], row["vote"]) for row in second] == [(False, 0), (False, 0), (True, 2)]


@pytest.mark.parametrize(
    "answers, values, weighted, best",
    [
        # Two that say the same weigh less than one of high value.
        ([(0, False), (1, True), (0, False)], [0.2, 0.9, 0.3], True, True),
        # And more than the best one.
        ([(0, True), (1, False), (0, True)], [0.5, 0.9, 0.5], True, False),
        # What gives no answer has no vote, whatever its value.
        ([(None, False), (1, True)], [0.9, 0.1], True, True),
        ([(None, False), (None, False)], [0.9, 0.1], False, False),
        # Of equal ones the first.
        ([(0, True), (1, False)], [0.5, 0.5], True, True),
        ([(0, False), (1, True)], [0.5, 0.5], False, False),
    ],
)
def test_values_choose_and_weigh_answers(answers, values, weighted, best):
    rows = [row | {"value": value} for row, value in zip(answer_rows("p", *answers), values)]
    for order in (rows, rows[::-1]):
        assert weighted_majority_is_right(order) == weighted
        assert best_is_right(order) == best
    scores = scores_of(rows)
    n = len(answers)
    assert scores[f"weighted maj@{n}"] == [weighted] and scores[f"best-of-{n}"] == [best]
    assert f"best-of-{n}" not in scores_of(answer_rows("p", *answers))
