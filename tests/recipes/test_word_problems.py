"""Generated word problems: right, deterministic, and disjoint between splits."""

import json
import re
from itertools import islice

import pytest

from pipa_openrlhf.annotate.equations import equation_value
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.evaluate.grading import extract_answer
from recipes.word_problems.make_problems import ProblemsConfig, main
from recipes.word_problems.problems import SPLITS, TURNED_CLOSINGS, generate_problems


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def take(split, count=400, seed=0, max_steps=3, turned=0.5):
    return list(islice(generate_problems(split, seed, max_steps, turned), count))


def test_worked_answers_are_right():
    for problem in take("train", 2000, max_steps=4):
        *equations, last = problem.steps
        values = [equation_value(step) for step in equations]
        assert None not in values, problem
        assert last == f"#### {problem.answer}" and str(values[-1]) == problem.answer
        assert all(value >= 1 for value in values)
        # every step but the first goes on from the value before it
        for value, step in zip(values, equations[1:], strict=False):
            assert step.startswith(f"{value} "), problem


def test_questions_tell_every_number_of_the_worked_answer():
    for problem in take("test", 500):
        seen_in_steps = {step.split()[2] for step in problem.steps[:-1]} | {problem.steps[0].split()[0]}
        told = {word.strip(".?") for word in problem.question.split()}
        assert seen_in_steps <= told, problem


def test_same_seed_same_problems_and_another_seed_others():
    assert take("train") == take("train")
    assert take("train", 50) == take("train", 400)[:50]
    assert not {p.question for p in take("train")} & {p.question for p in take("train", seed=1)}


def test_splits_share_neither_question_nor_equations_whatever_the_seeds():
    questions, equations = {}, {}
    for seed, split in enumerate(SPLITS):
        problems = take(split, seed=seed)
        questions[split] = {p.question for p in problems}
        equations[split] = {p.steps for p in problems}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not questions[one] & questions[other]
                assert not equations[one] & equations[other]


def test_no_problem_twice():
    problems = take("sample", 3000, max_steps=1)
    assert len({p.question for p in problems}) == 3000


def pattern_of(phrase: str) -> re.Pattern:
    """Of a phrase with its names, things and numbers."""
    pronoun = re.escape(phrase).replace(r"\{he\}", "(?:he|she)")
    return re.compile(re.sub(r"\\{\w+\\}", r"\\w+", pronoun), re.IGNORECASE)


TURNED = [pattern_of(phrase) for _, phrase in TURNED_CLOSINGS]


@pytest.mark.parametrize("turned", [0.0, 0.25, 1.0])
def test_a_share_of_the_problems_ends_in_words_that_mislead(turned):
    problems = take("test", 1000, max_steps=2, turned=turned)
    misled = [any(pattern.search(problem.question) for pattern in TURNED) for problem in problems]
    assert sum(misled) / len(misled) == pytest.approx(turned, abs=0.04)


def test_misleading_words_ask_for_the_other_operation():
    signs = dict(zip(TURNED, (sign for sign, _ in TURNED_CLOSINGS)))
    seen = set()
    for problem in take("test", 500, max_steps=2, turned=1.0):
        [pattern] = [one for one in TURNED if one.search(problem.question)]
        assert problem.steps[-2].split()[1] == signs[pattern]
        seen.add(pattern)
    assert len(seen) == len(TURNED)


def test_make_problems_writes_splits_and_sft_rows(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--train", "7", "--sample", "5"]
    assert run(main, ProblemsConfig, [*flags, "--validation", "3", "--test", "4"]) == 0
    counts = {split: len(read_jsonl(tmp_path / f"{split}.jsonl")) for split in SPLITS}
    assert counts == {"train": 7, "sample": 5, "validation": 3, "test": 4}
    for row, problem in zip(read_jsonl(tmp_path / "sft.jsonl"), read_jsonl(tmp_path / "train.jsonl"), strict=True):
        assert row["prompt"] == problem["question"] and row["label"] is True
        assert row["completion"] == "\n".join(problem["steps"])
        assert extract_answer(row["completion"]) == problem["answer"]


def test_make_problems_gives_the_training_split_a_share_of_its_own(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--train", "40", "--test", "40", "--sample", "0", "--validation", "0"]
    assert run(main, ProblemsConfig, [*flags, "--train_turned", "0", "--turned", "1"]) == 0
    for split, share in {"train": 0, "test": 1}.items():
        questions = [problem["question"] for problem in read_jsonl(tmp_path / f"{split}.jsonl")]
        assert all(any(pattern.search(one) for pattern in TURNED) == share for one in questions)


def test_make_problems_refuses_what_it_cannot_do(tmp_path, capsys):
    assert run(main, ProblemsConfig, ["--train", "3"]) == 1
    assert "--output_dir" in capsys.readouterr().err
    assert run(main, ProblemsConfig, ["--output_dir", str(tmp_path), "--max_steps", "0"]) == 1
    assert "--max_steps" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
