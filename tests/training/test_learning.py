"""Training does what the objective says, and tells every log about it."""

import json
import math
import sys
import types

import pytest
from tiny import run_in_process, train, write_jsonl


@pytest.fixture
def overfit(small_run, tmp_path):
    """Four answers to two problems, learned by heart from a prior that is the start of the policy."""
    rows = [
        {"prompt": f"{name}?\n", "completions": ["first", last], "labels": [True, last == "good"]}
        for name in ("one", "two")
        for last in ("good", "bad!")
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(**changes):
        return train(
            "train_pipa",
            *small_run(
                "out",
                **{
                    "data.dataset": data,
                    "prior.model_name_or_path": None,
                    "train.max_epochs": 150,
                    "lr_warmup_ratio": 0,
                    "ckpt.save_steps": None,
                    **changes,
                },
            ),
        )

    return make


@pytest.mark.parametrize("changes", [{}, {"ds.lora.rank": 8, "adam.lr": 0.02}], ids=["full", "lora"])
@pytest.mark.parametrize("variant", ["m", "n"])
def test_overfitting_drives_F_to_one_and_zero(overfit, variant, changes):
    rows = overfit(**{"pipa.variant": variant, **changes})
    first, last = rows[0], rows[-1]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "grad_norm"))
    assert first["pipa/F_chosen"] == pytest.approx(0.5, abs=1e-3) == first["pipa/F_rejected"]
    assert last["pipa/F_rejected"] < 0.15
    # PIPA-M's F may exceed one on right tokens: their loss rewards it.
    assert last["pipa/F_chosen"] > 0.95
    assert last["loss"] < 0.2 * first["loss"]
    # Which of two answers follows cannot be known before it begins, so this does not reach one.
    assert last["pipa/value_likelihood"] > first["pipa/value_likelihood"] + 0.02
    assert last["rewards/margins"] > 1


def test_without_a_value_head(overfit):
    rows = overfit(**{"pipa.fixed_value": 0.5})
    assert {round(row["pipa/value_likelihood"], 6) for row in rows} == {0.5}
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_bf16_learns_too(overfit):
    rows = overfit(**{"ds.param_dtype": "bf16", "ds.zero_stage": 2})
    assert rows[-1]["pipa/F_rejected"] < 0.1 and rows[-1]["pipa/F_chosen"] > 0.9


def test_diverging_run_stops_in_one_line(small_run, capsys):
    words = small_run("out", **{"adam.lr": 1e30, "train.max_epochs": 20, "ckpt.save_steps": None})
    assert run_in_process("train_pipa", *words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "learning rate" in lines[0]


def test_evaluation_is_of_the_policy_at_that_step(small_run, tmp_path):
    """On the training data as one batch, evaluation sees what the next step sees."""
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": f"{n}", "completion": "yes" * n, "label": n % 2} for n in (1, 2, 3)]
    )
    changes = {"data.dataset": data, "eval.dataset": data, "eval.steps": 1, "data.annotation": None}
    for micro in (1, 8):
        rows = train(
            "train_pipa",
            *small_run(f"out{micro}", **changes, **{"train.micro_batch_size": micro, "train.max_epochs": 3}),
        )
        for row, following in zip(rows, rows[1:]):
            for name in ("loss", "rewards/chosen", "pipa/value_likelihood", "pipa/F_rejected"):
                assert row[f"eval/{name}"] == pytest.approx(following[name], rel=1e-4)
    once = train("train_pipa", *small_run("once", **{**changes, "eval.steps": -1, "train.batch_size": 2}))
    assert [("eval/loss" in row) for row in once] == [False, True, False, True]


def test_learning_rate_follows_the_schedule(small_run):
    changes = {"lr_warmup_ratio": 0.3, "min_lr_ratio": 0.5, "ckpt.save_steps": None, "adam.lr": 1e-3}
    rates = [row["lr"] for row in train("train_pipa", *small_run("out", **changes))]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])  # two steps of warm-up
    assert rates[3:] == sorted(rates[3:], reverse=True) and all(5e-4 <= rate < 1e-3 for rate in rates[3:])


def test_tensorboard(small_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"logger.tensorboard_dir": tmp_path / "tb", "logger.wandb.run_name": "mine", "logger.logging_steps": 2}
    rows = train("train_pipa", *small_run("out", **changes))
    events = EventAccumulator(str(tmp_path / "tb" / "mine"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [2, 4, 6]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["loss"] for row in rows[1::2]])
    assert "train/pipa/value_likelihood" in events.Tags()["scalars"]


def test_wandb_gets_the_metrics_and_the_key_stays_hidden(small_run, tmp_path, monkeypatch):
    calls = {"login": [], "log": [], "finish": []}
    fake = types.ModuleType("wandb")
    fake.api = types.SimpleNamespace(api_key=None)
    fake.login = lambda key: calls["login"].append(key)
    fake.init = lambda **options: calls.update(init=options)
    fake.define_metric = lambda *names, **options: None
    fake.log = calls["log"].append
    fake.finish = lambda: calls["finish"].append(True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    secret = "not-a-real-key"
    words = small_run("out", **{"logger.wandb.key": secret, "logger.wandb.project": "sums"})
    monkeypatch.setattr(sys, "argv", ["train_pipa", *words])
    rows = train("train_pipa", *words)
    assert calls["login"] == [secret] and calls["finish"] == [True] and calls["init"]["project"] == "sums"
    assert [one["train/loss"] for one in calls["log"]] == [row["loss"] for row in rows]
    assert [one["train/global_step"] for one in calls["log"]] == list(range(1, 7))
    assert secret not in json.dumps(calls["init"]["config"])
    assert json.loads((tmp_path / "out" / "args.json").read_text())["logger.wandb.key"] == "<hidden>"
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    # Written as --flag=value it is hidden as well.
    monkeypatch.setattr(sys, "argv", ["train_pipa", f"--logger.wandb.key={secret}"])
    train("train_pipa", *words, "--ckpt.overwrite")
    assert secret not in (tmp_path / "out" / "README.md").read_text()
