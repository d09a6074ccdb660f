"""A sweep on a local Ray cluster, and what its table says."""

import json
import os
from types import SimpleNamespace

import pytest
import yaml
from tiny import read_jsonl, run_module, write_jsonl

from pipa_openrlhf.distributed.ray_sweep import Sweep, run_commands
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.sweep_table import TrialRow, best, markdown, write
from pipa_openrlhf.training import run_lock


def row(number: int, value: float | None = None, why: str | None = None) -> TrialRow:
    state = "finished" if value is not None else "failed" if why else "waiting"
    return TrialRow(
        number,
        {"adam.lr": f"{number}e-5", "data": "a|b"},
        state,
        why,
        None,
        f"out/{number}",
        "accuracy",
        value,
        (0, 1),
        8,
    )


def test_the_best_trial_is_the_first_of_highest_value():
    rows = [row(1, 0.25), row(2, 0.5), row(3, 0.5), row(4, why="it ran out of memory"), row(5)]
    assert best(rows) == rows[1] and best(rows[3:]) is None and best([row(1, 0.0)]).trial == 1


def test_the_table_has_a_line_a_trial_the_best_first_and_those_that_failed_last(tmp_path):
    rows = [row(1, why="no\nroom"), row(2, 0.25), row(3), row(4, 0.5)]
    lines = markdown(rows).splitlines()
    assert (
        lines[0]
        == "Best: trial 4 (adam.lr 4e-5; data a|b), accuracy 50.0% (0.0% to 100.0%) of 8 problems, in `out/4`."
    )
    assert lines[2] == "| trial | adam.lr | data | result |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[4:]] == ["4", "2", "3", "1"]
    assert lines[-1] == r"| 1 | 1e-5 | a\|b | failed: no room |" and "| waiting |" in lines[-2]
    assert markdown(rows[:1]).startswith("No trial has finished.\n")
    write(str(tmp_path), rows)
    assert [one["why"] for one in read_jsonl(tmp_path / "results.jsonl")] == ["no\nroom", None, None, None]
    assert sorted(os.listdir(tmp_path)) == ["results.jsonl", "results.md"]


def test_the_first_error_of_a_command_is_why_it_failed(tmp_path):
    log = tmp_path / "log.txt"
    commands = [["objectives"], ["train_pipa", "--adam.lr", "-1"], ["objectives"]]
    assert run_commands(commands, str(log), ranks=1) == "--adam.lr must not be negative, got -1.0"
    printed = log.read_text()
    assert printed.endswith("error: --adam.lr must not be negative, got -1.0\n")
    assert run_commands([["objectives"]], str(log), ranks=1) is None
    # One command ran before the wrong one, and none after it.
    assert log.read_text() == printed + printed.removesuffix("error: --adam.lr must not be negative, got -1.0\n")


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("pipa_openrlhf.lag.LAG", 0.2)
    assert "give an --sweep.output_dir that all nodes see" in run_commands([], f"{tmp_path}/x/log.txt", ranks=1)


class Known(Sweep):
    """A sweep whose prior pass reported these rows."""

    def __init__(self, folder, reported):
        config = SimpleNamespace(train=SimpleNamespace(max_epochs=1))
        shared = {"config": config, "evaluation_id": lambda: "e" * 64}
        trials = [SimpleNamespace(point={"a": str(number)}, **shared) for number in range(3)]
        super().__init__(str(folder), trials, ranks=1)
        (folder / "prior_pass").mkdir()
        write_jsonl(folder / "prior_pass" / "report.jsonl", reported)


def test_what_the_prior_pass_could_not_read_has_failed_and_the_others_wait(tmp_path):
    sweep = Known(tmp_path, [{"identity": "1"}, {"error": "no such file"}])
    sweep.take_identities("killed")
    assert [one.state for one in sweep.rows] == ["waiting", "failed", "failed"] and sweep.waiting() == [0]
    assert sweep.rows[1].why == "no such file" and sweep.rows[2].why == "the prior pass ended before: killed"


def test_two_names_of_one_run_are_refused(tmp_path):
    sweep = Known(tmp_path, [{"identity": "1"}, {"identity": "2"}, {"identity": "1"}])
    with pytest.raises(UserError, match="^two trials are the same run: a 0 and a 2; remove one value"):
        sweep.take_identities(None)


def test_two_sweeps_do_not_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with run_lock.alone_in(str(tmp_path), "--sweep.output_dir"), pytest.raises(UserError, match="another --sweep.out"):
        with run_lock.alone_in(str(tmp_path), "--sweep.output_dir"):
            pass


@pytest.fixture
def sweep_file(tiny_models, tmp_path):
    """``sweep_file(grid)`` -> the path of a sweep that takes no time."""
    rows = [{"prompt": f"{n}?\n", "completions": ["x", "y"], "labels": [n % 2 > 0, n % 3 > 0]} for n in range(8)]
    content = {
        "train": {
            "model.model_name_or_path": str(tiny_models / "policy"),
            "prior.model_name_or_path": str(tiny_models / "prior"),
            "prior.cache_dir": str(tmp_path / "cache"),
            "data": {"dataset": write_jsonl(tmp_path / "data.jsonl", rows), "input_template": "{}\n"},
            "ds": {"param_dtype": "fp32", "zero_stage": 0},
            "train.batch_size": 8,
        },
        "evaluate": {
            "problems.file": write_jsonl(tmp_path / "problems.jsonl", [{"question": "1+1?", "answer": "2"}]),
            "evaluate.max_new_tokens": 2,
        },
    }

    def make(grid: dict) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**content, "grid": grid}, sort_keys=False))
        return str(path)

    return make


@pytest.mark.slow
def test_a_sweep_goes_on_and_does_nothing_twice(sweep_file, tmp_path, monkeypatch):
    """Two good trials and one that fails, then the same file with other names and a trial more: 100 seconds on an idle
    machine."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    lr = {"low": {"adam.lr": 1e-4}, "broken": {"adam.lr": 1e30, "train.max_bad_steps": 0, "train.max_epochs": 3}}
    words = ["--sweep.output_dir", tmp_path / "out", "--ray.address", "local"]
    done = run_module("sweep_ray", "--sweep.file", sweep_file({"rate": lr}), *words, timeout=1500)
    assert done.returncode == 1, done.stderr[-2000:]
    good, broken = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert good["state"] == "finished" and good["problems"] == 1 and good["value"] in (0.0, 1.0)
    assert broken["state"] == "failed" and "--train.max_bad_steps" in broken["why"]
    assert "Best: trial 1 (rate low)" in done.stdout and "| 2 | broken | failed: " in done.stdout

    # The prior was scored before any trial began, and no trial scored it again.
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    logs = [open(os.path.join(one["folder"], "log.txt")).read() for one in (good, broken)]
    assert all("Prior cache: 8 hits, 0 misses" in log for log in logs)

    # A trial is the run that its commands make by themselves.
    args = json.loads(open(os.path.join(good["folder"], "model", "args.json")).read())
    reported = read_jsonl(tmp_path / "out" / "prior_pass" / "report.jsonl")[0]["identity"]
    assert args["resolved.identity"]["digest"] == reported and args["resolved.finished"]

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").rglob("*") if path.is_file()}
    named_otherwise = {"a": lr["low"], "b": {"adam.lr": 2e-4}}
    again = run_module("sweep_ray", "--sweep.file", sweep_file({"learning": named_otherwise}), *words, timeout=1500)
    assert again.returncode == 0, again.stderr[-2000:]
    first, second = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert first["folder"] == good["folder"] and first["value"] == good["value"] and second["state"] == "finished"
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
