"""scripts/compare_objectives.sh: in its short form trains and evaluates everything."""

import math
import re

import pytest
from tiny import read_jsonl

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


@pytest.mark.slow
def test_it_compares_every_objective_and_is_not_run_twice(run_script, finished_quickstart):
    """About 240 seconds, nearly all of it starting 22 processes."""
    work = finished_quickstart
    first = run_script("compare_objectives.sh", "--fast", "--work", work, "--lr", "1e-3")
    assert first.returncode == 0, first.stderr[-2000:]
    assert_one_prior_pass(first.stdout)
    [out] = work.glob("compare_from_own_right_lr*")
    for name in RUNS:
        assert_trained(out / name)
    table = first.stdout[first.stdout.index("== report") :]
    for name in ("SFT on its own right answers", *(" (".join(run.rsplit("_", 1)) + ")" for run in RUNS)):
        assert name in table
    again = run_script("compare_objectives.sh", "--fast", "--work", work, "--lr", "1e-3", timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == 2 * len(RUNS)
    assert again.stdout.endswith(table)
