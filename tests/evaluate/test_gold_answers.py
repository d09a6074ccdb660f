"""Real gold answers, graded against their own worked solutions and against the next problem's answer."""

import json
from pathlib import Path

import pytest

from pipa_openrlhf.evaluate.grading import Grader, extract_answer
from pipa_openrlhf.generate.problems import read_problems

DATA = Path(__file__).parents[2].parent / "shared" / "data"
# An equation that answers what a number answers, which math-verify takes for the same.
SAME_ANSWERS = {("x=5", "5")}


@pytest.mark.parametrize(
    "data_set, solution, size", [("gsm8k", "answer", 1319), ("math500", "solution", 500)], ids=["gsm8k", "math500"]
)
def test_gold_answers_are_right_for_their_problem_and_for_no_other(data_set, solution, size):
    path = DATA / data_set / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    gold = [problem.answer for problem in read_problems(str(path))]
    worked = [extract_answer(json.loads(line)[solution]) for line in path.read_text().splitlines()]
    neighbours = list(zip(gold[1:] + gold[:1], gold))
    with Grader(seconds=60) as grader:
        assert grader.same(list(zip(worked, gold))) == [True] * size
        same = grader.same(neighbours)
    assert {pair for pair, is_same in zip(neighbours, same) if is_same and pair[0] != pair[1]} <= SAME_ANSWERS
