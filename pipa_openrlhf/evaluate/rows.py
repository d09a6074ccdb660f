"""Rows of an evaluation: one an answer, graded, and with the answers to one problem told apart for the vote."""

from pipa_openrlhf.evaluate.grader import Grader, grader_name
from pipa_openrlhf.evaluate.grading import committed_answer
from pipa_openrlhf.generate.job import MakeRows
from pipa_openrlhf.generate.problems import Problem
from pipa_openrlhf.generate.sampling import Answer

Answered = list[tuple[Problem, list[Answer]]]


def row_maker(grader: Grader) -> MakeRows:
    """From problems and their answers to rows of ``results.jsonl``."""

    def make_rows(answered: Answered) -> list[list[dict]]:
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


def _row(problem: Problem, answer: Answer, predicted: str | None, right: bool, vote: int | None) -> dict:
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
