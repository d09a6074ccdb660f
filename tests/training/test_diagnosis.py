"""Every usual cause of a flat run is named where the metrics show it, with its numbers, and a healthy run has none."""

import json

import pytest
from tiny import train

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.report import main
from pipa_openrlhf.training.diagnosis import MIN_STEPS, diagnose

SETTINGS = {"max_norm": 1.0, "pipa.fixed_value": None}
STEPS = 50


def history(steps=STEPS, **columns) -> list[dict]:
    """Metrics of a run that learns; ``columns`` replace some, a constant or a function of the share of the run."""
    healthy = {
        "lr": lambda t: 1e-4 * (1 - 0.9 * t),
        "grad_norm": lambda t: 0.5 + t,
        "loss": lambda t: 0.7 - 0.2 * t,
        "right_token_share": lambda t: 0.5 + 0.1 * t,
        "logratio/chosen": lambda t: 3 * t,
        "logratio/rejected": lambda t: -4 * t,
        "pipa/value_likelihood": lambda t: 0.5 + 0.1 * t,
        "pipa/clip_fraction": lambda t: 0.02 * t,
        "kl": lambda t: 0.5 * t,
    }
    columns = {name.replace("__", "/"): value for name, value in columns.items()}
    return [
        {
            "step": step,
            **{name: value(step / steps) if callable(value) else value for name, value in (healthy | columns).items()},
        }
        for step in range(1, steps + 1)
    ]


# Columns that make a healthy run a sick one; the cause; numbers of the evidence, by hand.
CASES = {
    "lr_0": ({"lr": 0.0}, "Nothing was trained", ["at all 50 steps"]),
    "no_gradient": (
        {"lr": lambda t: 0 if t < 0.1 else 1e-4, "grad_norm": 0.0},
        "Nothing was trained",
        ["0 at 4 of 50 steps"],
    ),
    "warm_up": ({"lr": lambda t: 1e-4 * t}, "The schedule never left warm-up", ["from 2e-06 to 0.0001 at step 50"]),
    "labels": ({"right_token_share": 1.0}, "Every label is equal", ["all 50 steps are right"]),
    "labels_wrong": ({"right_token_share": 0.0}, "Every label is equal", ["all 50 steps are wrong"]),
    "z0": ({"kl": lambda t: 0.0 if t > 0.05 else 0.1}, "KTO's reference point", ["kl is 0 at 48 of 50 steps"]),
    "clip": (
        {"pipa__clip_fraction": lambda t: 0.4 if t > 0.5 else 0.0},
        "Many wrong tokens are clipped",
        ["0.40 over the last 10 steps"],
    ),
    "prior": (
        {"logratio__chosen": lambda t: 0.01 * t, "logratio__rejected": lambda t: -0.02 * t},
        "The policy is still its prior",
        ["after 50 steps", "further than 0.02 nats"],
    ),
    # Means over the first and the last ten steps: 0.11 and 0.91 of the slope.
    "falling": (
        {"logratio__chosen": lambda t: -5 * t, "logratio__rejected": lambda t: -10 * t},
        "Right answers fall with the wrong ones",
        ["by 4.0 nats", "by 8.0"],
    ),
    "gradient": (
        {"grad_norm": lambda t: 40 + t if t > 0.05 else 0.5, "loss": 0.7},
        "The gradient is clipped",
        ["above --max_norm 1 at 48 of 50 steps", "median is 40.5", "from 0.7 to 0.7"],
    ),
    "value": (
        {"pipa__value_likelihood": lambda t: 0.5 + 0.004 * t},
        "The value head is at chance",
        ["0.504 over the last 10 steps"],
    ),
}


def test_a_healthy_run_has_no_finding():
    assert diagnose(history(), SETTINGS) == []
    assert diagnose([], SETTINGS) == []


@pytest.mark.parametrize("name", CASES)
def test_each_cause_alone_is_named_with_its_numbers(name):
    columns, cause, numbers = CASES[name]
    [found] = diagnose(history(**columns), SETTINGS)
    assert found.cause.startswith(cause)
    for number in numbers:
        assert number in found.evidence
    assert "--" in found.remedy and str(found).count("\n") == 0


@pytest.mark.parametrize("name", ["z0", "prior", "falling", "gradient", "value"])
def test_a_short_run_is_not_judged_by_where_it_leads(name):
    columns, *_ = CASES[name]
    assert diagnose(history(MIN_STEPS - 1, **columns), SETTINGS) == []


def test_nulls_are_left_out():
    rows = history(**CASES["falling"][0])
    for row in rows[::2]:
        row["logratio/chosen"] = row["grad_norm"] = row["pipa/value_likelihood"] = None
    [found] = diagnose(rows, SETTINGS)
    assert found.cause.startswith("Right answers fall")


def test_sft_has_right_answers_alone():
    rows = history(right_token_share=1.0)
    kept = [{name: row[name] for name in ("step", "lr", "grad_norm", "loss", "right_token_share")} for row in rows]
    assert diagnose(kept, SETTINGS) == []


def test_large_gradients_of_a_loss_that_falls_are_no_fault():
    assert diagnose(history(grad_norm=40.0), SETTINGS) == []
    assert diagnose(history(grad_norm=40.0, loss=0.7), {**SETTINGS, "max_norm": 0}) == []


def test_a_fixed_value_is_no_head_at_chance():
    rows = history(pipa__value_likelihood=0.5)
    assert len(diagnose(rows, SETTINGS)) == 1
    assert diagnose(rows, SETTINGS | {"pipa.fixed_value": 0.5}) == []


def test_a_rate_that_only_rises_at_first_or_stays_is_no_warm_up():
    assert diagnose(history(lr=lambda t: min(t, 0.1)), SETTINGS) == []


def test_what_follows_from_no_update_is_not_listed_too():
    still = history(lr=0.0, logratio__chosen=0.0, logratio__rejected=0.0, kl=0.0, pipa__value_likelihood=0.5)
    assert [one.cause for one in diagnose(still, SETTINGS)] == ["Nothing was trained"]
    both = diagnose(history(lr=0.0, right_token_share=1.0), SETTINGS)
    assert [one.cause for one in both] == ["Nothing was trained", "Every label is equal"]


def test_pairs_have_a_constant_share_of_right_tokens():
    assert diagnose(history(right_token_share=0.5), SETTINGS) == []


def test_a_policy_that_left_its_prior_on_one_side_is_not_its_prior():
    assert diagnose(history(logratio__rejected=0.0), SETTINGS) == []


def test_log_and_report_of_a_run_with_learning_rate_0_say_so(small_run, tmp_path, capsys):
    train("train_pipa", *small_run("out", **{"adam.lr": 0, "ckpt.save_steps": None}))
    line = "Nothing was trained: the learning rate is 0 at all 6 steps. Give --adam.lr"
    assert line in capsys.readouterr().out.splitlines()[-1]

    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    row = {"problem_id": "1", "right": True, "predicted": "1", "finished": True}
    (evaluation / "results.jsonl").write_text(json.dumps(row))
    (evaluation / "summary.json").write_text('{"accuracy": 1, "interval_95": [1, 1], "n": 1}')
    page = tmp_path / "report.html"
    words = ["--report.evaluations", f"a={evaluation}", "--report.output", str(page), "--report.runs"]
    assert run(main, "report", [*words, f"<PIPA>={tmp_path / 'out'}"]) == 0
    assert f"<PIPA>. {line}" in capsys.readouterr().out
    assert "&lt;PIPA&gt;. Nothing was trained</b>: the learning rate is 0 at all 6 steps. Give" in page.read_text()
