"""scripts/compare_objectives.sh: refuses what it cannot use, and in its short form trains and evaluates everything."""

import math
import re
from itertools import islice

import pytest
from tiny import flags, make_model, make_tokenizer, read_jsonl, run_in_process, write_jsonl

from recipes.word_problems.problems import generate_problems

RUNS = (
    "PIPA-M_answer",
    "PIPA-M_step",
    "PIPA-N_answer",
    "PIPA-N_step",
    "DPO_answer",
    "IPO_answer",
    "Step-DPO-l1_step",
    "Step-DPO-l0_step",
    "KTO_answer",
    "Step-KTO-l1_step",
    "Step-KTO-per_step_step",
)


def assert_trained(folder):
    """No NaN, and a margin that grows from the first epoch to the last."""
    rows = read_jsonl(folder / "metrics.jsonl")
    assert all(row["loss"] is not None and math.isfinite(row["grad_norm"]) for row in rows)

    def mean_margin(epoch: int) -> float:
        margins = [row["rewards/margins"] for row in rows if math.ceil(row["epoch"]) == epoch]
        known = [margin for margin in margins if margin is not None]
        return sum(known) / len(known)

    assert mean_margin(round(rows[-1]["epoch"])) > mean_margin(1)


def assert_one_prior_pass(output):
    """Nothing is scored twice: after the first run only KTO's mismatches are new, and those once."""
    misses = [int(count) for count in re.findall(r"Prior cache: \d+ hits, (\d+) misses", output)]
    assert len(misses) == len(RUNS)
    kto = RUNS.index("KTO_answer")
    assert misses[kto] > 0 and not any(misses[1:kto]) and not any(misses[kto + 1 :])


def test_unknown_argument(run_script):
    done = run_script("compare_objectives.sh", "--slow", timeout=20)
    assert done.returncode == 1
    assert done.stderr == "error: unknown argument --slow (use --fast, --work FOLDER or --lr RATE)\n"


def test_without_a_quickstart(run_script, tmp_path):
    done = run_script("compare_objectives.sh", "--work", tmp_path, timeout=20)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} has no finished quickstart: run bash scripts/quickstart.sh")


@pytest.fixture
def finished_quickstart(tmp_path):
    """What the script needs of a quickstart, with a tiny model for SFT's and answers made from the worked ones."""
    make_model(0, initializer_range=0.05).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    problems = list(islice(generate_problems("sample", 0, 2), 24))
    (tmp_path / "problems").mkdir()
    rows = [
        {"problem_id": str(number), "question": one.question, "steps": list(one.steps), "answer": str(one.answer)}
        for number, one in enumerate(problems)
    ]
    test_file = write_jsonl(tmp_path / "problems" / "test.jsonl", rows[:4])
    answers = []
    for row in rows:
        for label in (True, False):
            steps = row["steps"] if label else [*row["steps"][:-1], row["steps"][-1] + "0"]
            labels = [True] * (len(steps) - 1) + [label]
            answers.append(
                {"problem_id": row["problem_id"], "prompt": row["question"], "completions": steps, "labels": labels}
            )
    write_jsonl(tmp_path / "answers.jsonl", answers)
    evaluation = {
        "model.model_name_or_path": tmp_path / "sft",
        "problems.file": test_file,
        "evaluate.output_dir": tmp_path / "evaluate_sft",
        "data.input_template": "{}\n",
        "ds.param_dtype": "fp32",
        "evaluate.max_new_tokens": 40,
    }
    assert run_in_process("evaluate", *flags(evaluation)) == 0
    (tmp_path / "done").mkdir()
    for name in ("label_steps", "evaluate_sft"):
        (tmp_path / "done" / name).write_text(f"# {name}: 0 s\n")
    return tmp_path


@pytest.mark.slow
def test_it_compares_every_objective_and_is_not_run_twice(run_script, finished_quickstart):
    """About 240 seconds, nearly all of it starting 22 processes."""
    work = finished_quickstart
    first = run_script("compare_objectives.sh", "--fast", "--work", work, "--lr", "1e-3")
    assert first.returncode == 0, first.stderr[-2000:]
    assert_one_prior_pass(first.stdout)
    [out] = work.glob("compare_lr*")
    for name in RUNS:
        assert_trained(out / name)
    table = first.stdout[first.stdout.index("== report") :]
    for name in ("SFT", *(" (".join(run.rsplit("_", 1)) + ")" for run in RUNS)):
        assert name in table
    again = run_script("compare_objectives.sh", "--fast", "--work", work, "--lr", "1e-3", timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == 2 * len(RUNS)
    assert again.stdout.endswith(table)
