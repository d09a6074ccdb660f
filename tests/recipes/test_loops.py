"""scripts/iterative.sh and scripts/verifiable.sh: their short forms on a tiny model."""

import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer, read_jsonl, write_jsonl

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.evaluate.report import accuracy_curves
from recipes.one_pair import PairsConfig, main
from recipes.word_problems.problems import generate_problems

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import verifiable_curves  # noqa: E402


def sampled(problem_id, *labels):
    return [
        {"problem_id": problem_id, "prompt": f"{problem_id}?", "completion": f"{number}", "label": label}
        for number, label in enumerate(labels)
    ]


def test_the_pair_of_a_problem_is_its_first_right_and_its_first_wrong_answer(tmp_path, capsys):
    rows = sampled("a", False, True, True, False) + sampled("b", True, True) + sampled("c", True, False)
    output = tmp_path / "pairs.jsonl"
    words = ["--answers", write_jsonl(tmp_path / "sampled.jsonl", rows), "--output", str(output)]
    assert run(main, PairsConfig, words) == 0
    assert read_jsonl(output) == [
        {"problem_id": "a", "prompt": "a?", "chosen": "1", "rejected": "0"},
        {"problem_id": "c", "prompt": "c?", "chosen": "0", "rejected": "1"},
    ]
    assert capsys.readouterr().out == f"2 pairs of 3 problems: {output}\n"


@pytest.mark.parametrize(
    "rows, message",
    [
        (sampled("a", True, True), "no problem has both a right and a wrong answer"),
        ([{"prompt": "a", "label": True}], "needs `problem_id`, `prompt`, `completion` and `label`"),
        ([{**sampled("a", True)[0], "label": "yes"}], "needs `problem_id`"),
        (None, "no such file"),
    ],
)
def test_answers_without_pairs_are_refused(tmp_path, capsys, rows, message):
    path = tmp_path / "sampled.jsonl"
    if rows is not None:
        write_jsonl(path, rows)
    assert run(main, PairsConfig, ["--answers", str(path), "--output", str(tmp_path / "pairs.jsonl")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "pairs.jsonl").exists()


def test_a_curve_is_accuracy_over_the_tokens_generated_up_to_a_round(tmp_path):
    def evaluated(name, value):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(
            json.dumps({"accuracy": value, "interval_95": [value - 0.1, value + 0.2], "n": 10})
        )

    def sampled_tokens(name, *texts):
        write_jsonl(tmp_path / name, [{"completion": text, "finished": end} for text, end in texts])

    evaluated("evaluate_start", 0.2)
    # The tokenizer has a token a byte; an answer that was cut has no end.
    sampled_tokens("sampled_1.jsonl", ("1234", True), ("é", False))
    for arm, more, values in (("dpo", "12", (0.3, 0.4)), ("pipa", "123", (0.5, 0.6))):
        sampled_tokens(f"sampled_{arm}_2.jsonl", (more, True))
        for number, value in enumerate(values, start=1):
            evaluated(f"evaluate_{arm}_{number}", value)
    found = verifiable_curves.curves(tmp_path, make_tokenizer())
    assert {name: [(one.x, one.value) for one in points] for name, points in found.items()} == {
        "DPO, one pair a problem": [(0, 0.2), (7, 0.3), (10, 0.4)],
        "PIPA-M, all answers": [(0, 0.2), (7, 0.5), (11, 0.6)],
    }
    assert (found["PIPA-M, all answers"][2].low, found["PIPA-M, all answers"][2].high) == (0.5, 0.8)
    svg = accuracy_curves(found, "generated tokens")
    assert all(text in svg for text in (*found, "generated tokens", "accuracy, %"))


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """A tiny model that answers with a digit, whatever it is asked: now and then that is right."""
    folder = tmp_path_factory.mktemp("guesser") / "model"
    model, tokenizer = make_model(0, initializer_range=0.05).train(), make_tokenizer()
    problems = (one for one in generate_problems("train", 0, 2, largest_value=10) if len(one.answer) == 1)
    texts = [f"{one.question}\n#### {one.answer}" for one in islice(problems, 270)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(120):
        rows = [[*tokenizer(text)["input_ids"], 257] for text in texts[step % 9 * 30 : step % 9 * 30 + 30]]
        # The end of the question is context enough; the answer has seven tokens.
        ids = torch.tensor([row[-24:] for row in rows])
        labels = torch.where(torch.arange(24) < 24 - 7, -100, ids)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def column(text, name) -> list[str]:
    """Cells of the second column of a printed table's rows that begin with ``name``."""
    return re.findall(rf"^{name}\s\s+(\d+\.\d%)", text, re.MULTILINE)


@pytest.mark.slow
def test_iterative_rounds_go_on_from_each_other(run_script, guesser, tmp_path):
    """About 70 seconds, nearly all of it starting processes."""
    words = ("iterative.sh", "--fast", "--start", guesser, "--work", tmp_path, "--prior", "first")
    first = run_script(*words)
    assert first.returncode == 0, first.stderr[-2000:]
    table = first.stdout[first.stdout.index("== report") :]
    assert all(len(column(table, f"round {number}")) == 1 for number in range(3))
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    trained = [line for line in commands if "train_pipa" in line]
    assert len(trained) == 2
    assert f"--model.model_name_or_path {guesser} " in trained[0]
    assert f"--model.model_name_or_path {tmp_path}/round_1 " in trained[1]
    assert all(f"--prior.model_name_or_path {guesser} " in line for line in trained)
    problems = [
        {row["question"] for row in read_jsonl(tmp_path / f"problems_{one}" / "sample.jsonl")} for one in (1, 2)
    ]
    held_out = {row["question"] for row in read_jsonl(tmp_path / "problems_test" / "test.jsonl")}
    assert problems[0] != problems[1] and not held_out & (problems[0] | problems[1])
    for number in (1, 2):
        assert len(read_jsonl(tmp_path / f"sampled_{number}.jsonl")) == 12 * 8
    again = run_script(*words)
    assert again.returncode == 0 and again.stdout.count("done before") == 2 + 2 * 5
    assert again.stdout.endswith(table)


@pytest.mark.slow
def test_both_arms_learn_from_the_same_answers_of_their_common_start(run_script, guesser, tmp_path):
    """About 60 seconds, nearly all of it starting processes."""
    words = ("verifiable.sh", "--fast", "--rounds", "1", "--start", guesser, "--work", tmp_path)
    first = run_script(*words)
    assert first.returncode == 0, first.stderr[-2000:]
    end = first.stdout[first.stdout.index("== report") :]
    assert all(len(column(end, name)) == 1 for name in ("start", "DPO round 1", "PIPA round 1"))
    assert {path.name for path in tmp_path.glob("sampled_*.jsonl")} == {"sampled_1.jsonl"}
    answers, pairs = read_jsonl(tmp_path / "sampled_1.jsonl"), read_jsonl(tmp_path / "pairs_1.jsonl")
    assert len(answers) == 12 * 8
    units = {arm: json.loads((tmp_path / f"{arm}_1" / "args.json").read_text()) for arm in ("dpo", "pipa")}
    assert units["dpo"]["resolved.train_units"] == len(pairs) == len({row["problem_id"] for row in pairs})
    assert units["pipa"]["resolved.train_units"] == len(answers)
    # One token a byte, and one for the end.
    tokens = sum(len(row["completion"].encode()) + row["finished"] for row in answers)
    for arm in ("DPO, one pair a problem", "PIPA-M, all answers"):
        assert re.search(rf"^{arm} +0 +0 ", end, re.MULTILINE)
        assert re.search(rf"^{arm} +1 +{tokens:,} ", end, re.MULTILINE)
    assert "PIPA-M, all answers" in (tmp_path / "curves.svg").read_text()
