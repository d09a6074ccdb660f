"""The miniature study: its problems, its rows, its statistics, and all of it at toy size."""

import gzip
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from marks import ROOT
from tiny import read_jsonl, write_jsonl

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.errors import UserError
from recipes.arithmetic_study import change_answers, clipped_right, design, make_problems, parts, study
from recipes.arithmetic_study.model import CHARACTERS, make_tokenizer
from recipes.arithmetic_study.problems import SPLITS, Teacher, generate_chains, moves_ten
from recipes.arithmetic_study.results import compare, standard_error
from recipes.arithmetic_study.stages import CLI, Runner, Stage, path


def chains(split="test", count=300, seed=0):
    return list(islice(generate_chains(split, seed), count))


def test_a_teacher_without_a_flaw_is_right():
    for chain in chains():
        *equations, last = Teacher().steps(chain, random.Random(0))
        assert last == f"#### {eval(chain.question)}"
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in equations))


def test_the_flaw_forgets_tens_that_are_carried_or_borrowed_at_the_rate_of_their_digits():
    teacher, rng = Teacher(0.5, 0.5), random.Random(1)
    forgotten, seen = Counter(), Counter()
    for chain in chains("base", 4000):
        for step in teacher.steps(chain, rng)[:-1]:
            left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(-?\d+)", step).groups()
            difference = eval(f"{left}{sign}{right}") - int(result)
            pair = (sign, (int(left) % 10, int(right) % 10))
            seen[pair] += 1
            forgotten[pair] += difference == (10 if sign == "+" else -10)
            assert difference == 0 or (abs(difference) == 10 and moves_ten(sign, int(left), int(right)))
    frequent = [pair for pair, count in seen.items() if count > 40 and moves_ten(pair[0], *pair[1])]
    assert len(frequent) > 60
    for pair in frequent:
        assert abs(forgotten[pair] / seen[pair] - teacher.rate(*pair)) < 4 * 0.5 / math.sqrt(seen[pair])
    rates = [teacher.rate(*pair) for pair in frequent]
    assert min(rates) < 0.1 and max(rates) > 0.9


def test_splits_are_disjoint_and_the_same_every_time():
    of_split = {split: {chain.question for chain in chains(split, 200)} for split in SPLITS}
    assert all(len(questions) == 200 for questions in of_split.values())
    assert not any(one & other for one, other in itertools.combinations(of_split.values(), 2))
    assert chains("sample", 20, seed=3) == chains("sample", 20, seed=3) != chains("sample", 20, seed=4)


def test_the_tokenizer_has_a_token_a_character():
    tokenizer = make_tokenizer()
    text = "47+38-19\n47+38=85\n#### 66"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text and len(tokenizer) == len(CHARACTERS) + 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--output_dir is required"),
        (["--flaw", "0.9"], "--spread 0.35: --flaw 0.9 plus and minus it must be between 0 and 1"),
        (["--least", "5"], "--least 5 is more than --most 4"),
        (["--test", "0"], "--test must be at least 1"),
    ],
)
def test_mistakes_in_flags_of_problems(tmp_path, capsys, flags, message):
    output = ["--output_dir", str(tmp_path / "out")] if flags else []
    assert run(make_problems.main, make_problems.ProblemsConfig, [*output, *flags]) == 1
    assert message in capsys.readouterr().err


def test_the_rows_are_those_of_table_1():
    """By hand, from the paper."""
    rows = design.headline()
    assert Counter(row.setting for row in rows) == {
        "right answers": 1,
        "paired, answer": 5,
        "paired, step": 4,
        "unpaired, answer": 3,
        "unpaired, step": 3,
    }
    modules = {"PIPA-M": "train_pipa", "PIPA-N": "train_pipa", "KTO": "train_kto", "Step-KTO": "train_kto"}
    modules |= {"DPO": "train_dpo", "IPO": "train_dpo", "Step-DPO": "train_dpo", "SFT": "train_sft"}
    for row in rows:
        assert row.module == modules[row.method]
        assert (row.flags.get("data.pairing") == "match") == row.setting.startswith("paired")
        assert (row.flags.get("data.annotation") == "step") == row.setting.endswith("step")
        assert row.flags.get("pipa.variant") == {"PIPA-M": "m", "PIPA-N": "n"}.get(row.method)
        assert row.flags.get("model.ipo_enable", False) == (row.method == "IPO")


@pytest.mark.parametrize("part", [study.HEADLINE, *parts.PARTS])
def test_every_command_of_a_part_is_one_that_its_parser_takes(part):
    sizes, headline = design.Sizes(), design.headline()
    rows = headline if part == study.HEADLINE else parts.PARTS[part]()
    rates = {row.rate_of: 1e-3 for row in [*headline, *rows]}
    stages = design.preparation(sizes) + parts.preparation(part, rows, rates, sizes)
    stages += study.final_runs(rows, rates, sizes)
    assert len({stage.name for stage in stages}) == len(stages)
    paths = {stage.name: f"work/{stage.name}" for stage in stages}
    made = set()
    for stage in stages:
        assert made.issuperset(stage.needs), stage.name
        made.add(stage.name)
        words = stage.argv(paths)
        named = {word.removeprefix("work/").split("/")[0] for word in words if word.startswith("work/")}
        assert named == {stage.name, *stage.needs} & named and named >= set(stage.needs) - {"problems"}
        if stage.module.startswith(CLI):
            parse(stage.module.removeprefix(CLI), words)
    trained = [stage for stage in stages if stage.output == "ckpt.output_dir"]
    assert len({stage.argv(paths)[3:] and tuple(stage.argv(paths)[2:]) for stage in trained}) == len(trained)


CHANGED = {
    ("scaling", "of4_seed1"): {"answers": "w/answers16_seed1.jsonl", "answers_per_problem": "4"},
    ("scaling", "share0.25_seed0"): {"answers": "w/answers_seed0.jsonl", "share": "0.25"},
    ("noise", "wrong0.1_seed0"): {"answers": "w/answers_seed0.jsonl", "wrong_labels": "0.1"},
    ("imbalance", "ratio8_seed0"): {"answers": "w/answers_seed0.jsonl", "right_per_wrong": "8"},
    ("imbalance", "equal8_seed0"): {"answers": "w/answers_seed0.jsonl", "right_per_wrong": "8", "equal_classes": True},
    ("threshold", "threshold-0.5_seed0"): {"answers": "w/answers_seed0.jsonl", "threshold": "-0.5"},
    ("checked", "checked_seed1"): {"answers": "w/sampled_seed1.jsonl", "check_right": True},
}


@pytest.mark.parametrize("part, name", CHANGED)
def test_answers_of_a_part_are_changed_as_their_name_says(part, name):
    sizes = design.Sizes(seeds=2)
    rows = parts.PARTS[part]()
    stages = design.preparation(sizes) + parts.preparation(part, rows, {}, sizes)
    paths = {stage.name: f"w/{stage.name}{stage.output_file}" for stage in stages}
    words = next(stage for stage in stages if stage.name == name).argv(paths)
    assert words[:2] == ["--output", f"w/{name}.jsonl"]
    found = {}
    for word, value in zip(words[2:], [*words[3:], "--"]):
        if word.startswith("--"):
            found[word[2:]] = True if value.startswith("--") else value
    assert {key: value for key, value in found.items() if key not in ("seed", "problems")} == CHANGED[part, name]


@pytest.mark.parametrize(
    "tried, best, beyond",
    [
        ([3e-5, 1e-4, 3e-4], 1e-4, 0),
        ([3e-5, 1e-4, 3e-4], 3e-5, 9e-6),
        ([1e-4, 3e-4, 1e-3], 1e-3, 3e-3),
        ([1e-5, 3e-5], 1e-5, 3e-6),
        ([1e-4], 1e-4, 0),
        ([1e-3, 1.2e-3], 1.2e-3, 0),
        ([1.2e-3, 1.4e-3], 1.2e-3, 1e-3),
    ],
)
def test_the_learning_rate_beyond_an_end(tried, best, beyond):
    assert study.next_rate(tried, best) == beyond


def test_learning_rates_are_chosen_over_all_seeds_and_beyond_the_grid(monkeypatch):
    """Rates by what the first seed is best at: seed 1 prefers another; one row is best below the grid, one above."""
    best_of = {"kto": [1e-4, 3e-4], "dpo": [9e-6, 9e-6], "sft": [1e-1, 1e-1]}
    ran, said = [], []

    class Run:
        def run(self, stages):
            ran.extend(stage.name for stage in stages if stage.name.endswith("_validation"))

        def path(self, name):
            return name

        def say(self, line):
            said.append(line)

    def accuracy(name):
        row, rate, seed = name.removesuffix("_validation").replace("_lr", " ").replace("_seed", " ").split()
        away = abs(math.log(float(rate) / best_of[row][int(seed)]))
        return {"accuracy": -away * (3 if seed == "1" else 1)}

    monkeypatch.setattr(study, "read_summary", accuracy)
    rows = [design.Row(name, "", name, "train_sft") for name in best_of]
    sizes = design.Sizes(seeds=2, rates=(3e-5, 1e-4, 3e-4, 1e-3), more_rates=2)
    assert study.choose_rates(Run(), rows, sizes) == {"kto": 3e-4, "dpo": 9e-6, "sft": 9e-3}
    tried = {row: sorted({float(name.split("_")[1][2:]) for name in ran if name.startswith(row)}) for row in best_of}
    assert said == ["sft: the best learning rate, 0.009, is at the end of those that were tried"]
    assert tried == {
        "kto": [3e-5, 1e-4, 3e-4, 1e-3],
        "dpo": [3e-6, 9e-6, 3e-5, 1e-4, 3e-4, 1e-3],
        "sft": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 9e-3],
    }


ANSWERS = [
    # problem, sample, steps, labels
    ("a", 0, ["1+1=2", "#### 2"], [True, True]),
    ("a", 1, ["1+1=2", "#### 3"], [True, False]),
    ("a", 2, ["1+1=2", "#### 4"], [True, False]),
    ("b", 0, ["1+1=3", "#### 3"], [False, False]),
    ("b", 1, ["1+1=2", "#### 2"], [True, True]),
]


def answer_rows():
    return [
        {"problem_id": problem, "sample": sample, "prompt": problem, "completions": steps, "labels": labels}
        for problem, sample, steps, labels in ANSWERS
    ]


def change(tmp_path, *flags) -> list[dict]:
    answers = write_jsonl(tmp_path / "answers.jsonl", answer_rows())
    output = tmp_path / "changed.jsonl"
    words = ["--answers", answers, "--output", str(output), *flags]
    assert run(change_answers.main, change_answers.ChangeConfig, words) == 0
    return read_jsonl(output)


def places(rows) -> list[tuple]:
    return [(row["problem_id"], row["sample"]) for row in rows]


def test_changed_answers(tmp_path):
    """Values by hand."""
    assert places(change(tmp_path, "--share", "0.5")) == [("a", 0), ("a", 1), ("a", 2)]
    assert places(change(tmp_path, "--answers_per_problem", "1")) == [("a", 0), ("b", 0)]
    turned = change(tmp_path, "--wrong_labels", "1")
    assert [row["labels"] for row in turned] == [[not one for one in labels] for *_, labels in ANSWERS]
    assert change(tmp_path) == answer_rows()
    for ratio, right, wrong in (("1", 2, 2), ("2", 2, 1), ("0.3333", 1, 3)):
        kept = change(tmp_path, "--right_per_wrong", ratio)
        assert Counter(row["labels"][-1] for row in kept) == {True: right, False: wrong}
    # Two right answers and three wrong ones: 2 x 5/4 = 3 x 5/6.
    weights = [row["weight"] for row in change(tmp_path, "--equal_classes")]
    assert weights == pytest.approx([5 / 4, 5 / 6, 5 / 6, 5 / 6, 5 / 4])
    # Of the three answers of "a" that begin with 1+1=2 one is right: a value of -1/3.
    low, high = (change(tmp_path, "--threshold", value) for value in ("-0.4", "-0.3"))
    assert [row["labels"] for row in low] == [labels for *_, labels in ANSWERS]
    assert [row["labels"] for row in high] == [
        [True, True],
        [False, False],
        [False, False],
        [False, False],
        [True, True],
    ]


def test_mistakes_in_changing_answers(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    for words in ([], ["--answers", "nowhere.jsonl"], ["--answers", str(tmp_path / "empty.jsonl")]):
        words = [*words, "--output", str(tmp_path / "out.jsonl")]
        assert run(change_answers.main, change_answers.ChangeConfig, words) == 1
        assert capsys.readouterr().err.startswith("error: ")
    right = write_jsonl(tmp_path / "right.jsonl", answer_rows()[:1])
    words = ["--answers", right, "--output", str(tmp_path / "out.jsonl"), "--equal_classes"]
    assert run(change_answers.main, change_answers.ChangeConfig, words) == 1
    assert "all answers have the same label" in capsys.readouterr().err


def test_right_tokens_above_one_have_no_gradient_where_they_are_clipped():
    """By hand, at g = 1/2: F is half of the policy's ratio to the prior."""
    config = SimpleNamespace(objective=SimpleNamespace(clip_eps=1e-10))
    clipped = clipped_right.make_objective(config)
    ratio = torch.tensor([1.0, 3.0, 1.0, 1.5])
    log_f = ratio.log().requires_grad_()
    zeros, label = torch.zeros(4), torch.tensor([1, 1, 0, 0])
    loss = clipped.token_loss(log_f, zeros, zeros, label)
    (gradient,) = torch.autograd.grad(loss.sum(), log_f)
    assert loss.tolist() == pytest.approx([math.log(2), 0, math.log(2), math.log(4)])
    assert gradient.tolist() == pytest.approx([-1, 0, 1, 3])


def test_comparisons_by_hand():
    ours, theirs = np.ones((1, 4)), np.zeros((1, 4))
    difference = compare(ours, theirs)
    # Of the 16 ways to choose four signs two are as far from 0.
    assert difference.mean == difference.low == difference.high == 1 and difference.p == pytest.approx(
        2 / 16, abs=0.03
    )
    same = compare(ours, ours)
    assert (same.mean, same.p) == (0, 1)
    # Seeds that disagree widen the interval, though the mean over seeds is the same for every problem.
    split = compare(np.array([[1.0] * 50, [0.0] * 50]), np.full((2, 50), 0.5))
    assert split.low == -0.5 and split.high == 0.5 and split.mean == 0
    assert standard_error(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error(np.array([1.0])))


def answers_stage(name, source, **flags) -> Stage:
    module = "recipes.arithmetic_study.change_answers"
    return Stage(
        name, module, "output", {"answers": path(source), **flags}, tuple(re.findall(r"{(.*)}", source)), ".jsonl"
    )


def test_stages_are_run_once_and_again_where_they_or_their_needs_change(tmp_path):
    source = write_jsonl(tmp_path / "answers.jsonl", answer_rows())
    work = str(tmp_path / "work")

    def ran(share) -> list[str]:
        said = []
        Runner(work, say=said.append).run(
            [answers_stage("first0.5", source, share=share), answers_stage("second", "{first0.5}")]
        )
        return [re.search(r"\] (\S+):", line)[1] for line in said[1:]]

    assert ran(1.0) == ["first0.5", "second"] and ran(1.0) == []
    assert len(read_jsonl(tmp_path / "work" / "second.jsonl")) == 5
    assert ran(0.5) == ["first0.5", "second"] and len(read_jsonl(tmp_path / "work" / "second.jsonl")) == 3
    (tmp_path / "work" / "done" / "second.json").unlink()
    assert ran(0.5) == ["second"]


def test_a_stage_that_fails_is_named_with_its_own_words_and_what_is_done_stays(tmp_path):
    source = write_jsonl(tmp_path / "answers.jsonl", answer_rows())
    good, bad = answers_stage("good", source), answers_stage("bad", "nowhere.jsonl")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"(?s)stage bad failed, see .*bad.log:.*nowhere.jsonl: no such file"):
            Runner(str(tmp_path / f"work{workers}"), workers).run([good, bad, answers_stage("after", "{bad}")])
        assert not (tmp_path / f"work{workers}" / "after.jsonl").exists()
    said = []
    Runner(str(tmp_path / "work1"), say=said.append).run([good, replace(bad, flags=good.flags)])
    assert [line.split()[1] for line in said[1:]] == ["bad:"]
    with pytest.raises(UserError, match="stage lost needs made, which no stage before it makes"):
        Runner(str(tmp_path / "work3")).run([answers_stage("lost", "{made}")])


def test_unknown_argument(run_script):
    done = run_script("study.sh", "--fast", timeout=20)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: unknown argument --fast (use --smoke, --part, --workers,"
    )


@pytest.mark.slow
def test_the_smoke_form_ends_in_a_whole_table_and_is_not_run_twice(run_script, tmp_path):
    """About 60 seconds of one core; not measured on an idle machine."""
    work = tmp_path / "work"
    done = run_script("study.sh", "--smoke", "--work", work, "--workers", 1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = json.loads((work / "results" / "headline.json").read_text())
    rows = design.headline()
    assert [record["name"] for record in records] == [row.name for row in rows]
    for row, record in zip(rows, records):
        numbers = [*record["test"], record["mean"], record["standard_error"], record["validation"]]
        assert len(record["test"]) == 2 and all(map(math.isfinite, numbers))
        metrics = record["metrics"]
        assert all(value is None or math.isfinite(value) for value in metrics.values())
        assert (metrics["pipa/F_rejected"] is not None) == row.is_pipa
        assert ("against" in record) == row.is_pipa
        # It has trained: log-ratios are no longer those of step 0.
        assert row.module == "train_sft" or abs(metrics["logratio/rejected"]) > 1e-4
    table = (work / "results" / "headline.md").read_text()
    assert all(f"| {row.setting} | {row.method} |" in table for row in rows) and "nan" not in table
    with gzip.open(work / "results" / "headline_answers.jsonl.gz", "rt") as file:
        assert Counter(json.loads(line)["row"] for line in file) == {row.name: 2 * 16 for row in rows}
    assert len(list((work / "results").glob("*.svg"))) == 4
    again = run_script("study.sh", "--smoke", "--work", work, "--workers", 1, timeout=300)
    assert again.returncode == 0 and "stages to run" not in again.stdout and table in again.stdout


def is_running(pid: int) -> bool:
    """Also false for one that nobody has waited for yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    code = (
        "import os, time; from recipes.arithmetic_study.stages import Runner\n"
        f"with Runner({str(tmp_path)!r}, 2)._executor() as executor:\n"
        "    print(executor.submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        worker = int(process.stdout.readline())
        assert is_running(worker)
        process.kill()
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker is left behind")
