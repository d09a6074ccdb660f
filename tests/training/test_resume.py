"""A run that was cut anywhere goes on as if it had not been."""

import json
import os
import shutil
import signal
import time
from functools import partial

import pytest
from cut_runs import assert_same_end, checkpoints, cut, losses
from safetensors.torch import load_file
from tiny import read_jsonl, run_in_process, start_module, train, write_jsonl

from pipa_openrlhf.settings import updated
from pipa_openrlhf.training import checkpoint, export, run
from pipa_openrlhf.training.run_folder import MANIFEST
from pipa_openrlhf.training.trainer import Callback

FULL = {}
LORA = {"ds.lora.rank": 4, "ds.lora.dropout": 0.2}


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_run_follows_the_uninterrupted_one(small_run, tmp_path, stage, dtype, changes):
    changes = {**changes, "ds.zero_stage": stage, "ds.param_dtype": dtype}
    whole = train("train_pipa", *small_run("whole", **changes))
    assert len(whole) == 6
    for step in (2, 3, 4):  # within an epoch, at its end, and in the second one
        resumed = tmp_path / f"from{step}"
        cut(tmp_path / "whole", resumed, step)
        rows = train("train_pipa", *small_run(f"from{step}", **changes, **{"ckpt.load_enable": True}))
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert losses(rows) == pytest.approx(losses(whole), rel=1e-6)
        for name in ("lr", "grad_norm", "num_tokens", "epoch"):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole], rel=1e-5)
        assert_same_end(tmp_path / "whole", resumed)


def test_two_ranks_resume_on_two_and_on_one_and_on_two_again(small_run, two_ranks, tmp_path):
    """At another ZeRO stage each time: a checkpoint knows neither."""
    stage_3, stage_2, stage_0 = ({"ds.zero_stage": stage} for stage in (3, 2, 0))
    result = two_ranks("train_pipa", *small_run("whole", **stage_3))
    assert result.returncode == 0, result.stderr[-2000:]
    whole = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    for name in ("two", "one"):
        cut(tmp_path / "whole", tmp_path / name, 2)
    train("train_pipa", *small_run("one", **stage_2), "--ckpt.load_enable")
    cut(tmp_path / "one", tmp_path / "two again", 4)
    for words in (small_run("two", **stage_3), small_run("two again", **stage_0)):
        result = two_ranks("train_pipa", *words, "--ckpt.load_enable")
        assert result.returncode == 0, result.stderr[-2000:]
    for name, error in (("two", 1e-6), ("one", 1e-4), ("two again", 1e-4)):
        rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        assert losses(rows) == pytest.approx(losses(whole), rel=error), name
    assert_same_end(tmp_path / "whole", tmp_path / "two")
    for name in ("two", "two again"):
        assert_halves(tmp_path / name / "checkpoints" / "global_step6")


def assert_halves(checkpoint) -> None:
    """Of two ranks each wrote half of every parameter."""
    parts = sorted(checkpoint.glob("trainable-*"))
    assert [path.name for path in parts] == [f"trainable-0000{rank}-00000.safetensors" for rank in (0, 1)]
    sizes = [sum(len(one) for name, one in load_file(path).items() if name.startswith("master.")) for path in parts]
    assert sum(sizes) == 13_745, "every part of a parameter once"
    assert 0.49 < sizes[0] / sum(sizes) < 0.51


def test_a_rank_writes_files_of_limited_size(small_run, tmp_path, monkeypatch):
    """Its state has 165 kB; of one parameter at most 50 kB."""
    whole = train("train_pipa", *small_run("whole"))
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40_000)
    train("train_pipa", *small_run("small files"))
    cut(tmp_path / "small files", tmp_path / "cut", 2)
    written = sorted((tmp_path / "cut" / "checkpoints" / "global_step2").glob("trainable-*"))
    assert [path.name for path in written] == [f"trainable-00000-{number:05}.safetensors" for number in range(4)]
    assert max(path.stat().st_size for path in written) < 40_000 + 50_000
    assert losses(train("train_pipa", *small_run("cut"), "--ckpt.load_enable")) == losses(whole)


def test_two_ranks_resume_with_their_dropout_masks(small_run, two_ranks, tmp_path):
    changes = {**LORA, "ds.zero_stage": 2}
    assert two_ranks("train_pipa", *small_run("whole", **changes)).returncode == 0
    cut(tmp_path / "whole", tmp_path / "resumed", 4)
    assert two_ranks("train_pipa", *small_run("resumed", **changes), "--ckpt.load_enable").returncode == 0
    whole, resumed = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_process_can_be_resumed(small_run, tmp_path, number, status):
    changes = {"train.max_epochs": 30, "adam.lr": 1e-3, "ckpt.max_num": 2}
    if number == signal.SIGINT:
        changes["ckpt.save_steps"] = None  # ctrl-C writes a checkpoint all the same
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    process = start_module("train_pipa", *small_run("stopped", **changes))
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors[-2000:]
    assert not (tmp_path / "stopped" / "README.md").exists()
    if number == signal.SIGINT:
        assert errors.splitlines()[-1] == "interrupted"
        assert "go on with --ckpt.load_enable" in output
    stopped_after = len(read_whole_lines(metrics))
    resumed = train("train_pipa", *small_run("stopped", **changes), "--ckpt.load_enable")
    whole = train("train_pipa", *small_run("whole", **{**changes, "ckpt.save_steps": None}))
    assert 5 < stopped_after < 90
    assert [row["step"] for row in resumed] == list(range(1, 91))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def read_whole_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_without_a_checkpoint_it_starts_from_the_beginning(small_run, capsys):
    rows = train("train_pipa", *small_run("out"), "--ckpt.load_enable")
    assert len(rows) == 6
    assert "starting from step 0" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(small_run, tmp_path):
    train("train_pipa", *small_run("two", **{"ckpt.max_num": 2}))
    assert checkpoints(tmp_path / "two") == ["global_step5", "global_step6"]
    # No whole GB is left for more than the one just written.
    train("train_pipa", *small_run("none", **{"ckpt.max_mem": 0}))
    assert checkpoints(tmp_path / "none") == ["global_step6"]
    train("train_pipa", *small_run("every", **{"ckpt.save_steps": 4}))
    assert checkpoints(tmp_path / "every") == ["global_step4"]


def test_checkpoint_path_and_intermediate_exports(small_run, tmp_path):
    train("train_pipa", *small_run("out", **{"ckpt.path": tmp_path / "kept", "ckpt.save_hf": True, "ckpt.max_num": 1}))
    assert sorted(os.listdir(tmp_path / "kept")) == ["global_step6", "global_step6_hf", MANIFEST]
    assert not (tmp_path / "out" / "checkpoints").exists()
    train("train_pipa", *small_run("disabled", **{"ckpt.disable_ds": True, "ckpt.save_hf": True}))
    assert checkpoints(tmp_path / "disabled") == [f"global_step{n}_hf" for n in range(1, 7)]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"train.batch_size": 5}, "--train.batch_size"),
        ({"train.seed": 7}, "--train.seed"),
        ({"data.max_samples": 9}, "--data.max_samples 1000000, here 9"),
        ({"data.annotation": "answer"}, "--data.annotation step, here answer"),
        ({"train.max_epochs": 1}, "--train.max_epochs 2, here 1"),
        ({"ds.lora.rank": 4}, "--ds.lora.rank"),
        ({"value.hidden_size": 8}, "--value.hidden_size"),
        ({"pipa.fixed_value": 0.5}, "--pipa.fixed_value"),
    ],
)
def test_resuming_something_else_is_refused(small_run, tmp_path, capsys, changes, named):
    train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 2)
    before = (tmp_path / "cut" / "args.json").read_text()
    capsys.readouterr()
    assert run_in_process("train_pipa", *small_run("cut", **{**changes, "ckpt.load_enable": True})) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and named in errors[0] and "global_step2" in errors[0]
    assert (tmp_path / "cut" / "args.json").read_text() == before
    assert len(train("train_pipa", *small_run("cut"), "--ckpt.load_enable")) == 6


def test_finished_run_is_left_alone(small_run, tmp_path, capsys):
    train("train_pipa", *small_run("out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    train("train_pipa", *small_run("out"), "--ckpt.load_enable")
    assert "finished after 6 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_killed_after_the_last_step_still_exports(small_run, tmp_path):
    train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 6)
    train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    cards = [(tmp_path / name / "README.md").read_text().splitlines()[-20:] for name in ("whole", "cut")]
    assert [line for line in cards[1] if "| loss |" in line] == [line for line in cards[0] if "| loss |" in line] != []


def test_more_epochs_go_on_from_a_finished_run(small_run):
    train("train_pipa", *small_run("out"))
    rows = train("train_pipa", *small_run("out", **{"train.max_epochs": 3}), "--ckpt.load_enable")
    assert [row["step"] for row in rows] == list(range(1, 10))


def test_second_run_in_the_same_folder(small_run, tmp_path, capsys):
    first = train("train_pipa", *small_run("out"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "checkpoints" / "mine").mkdir()
    capsys.readouterr()
    assert run_in_process("train_pipa", *small_run("out")) == 1
    assert "holds another run" in capsys.readouterr().err
    second = train("train_pipa", *small_run("out", **LORA), "--ckpt.overwrite")
    assert losses(second) != losses(first)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "checkpoints" / "mine").is_dir()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_overwriting_the_model_itself_is_refused(small_run, tmp_path, tiny_models, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_models / "policy", model)
    for name in ("model.model_name_or_path", "prior.model_name_or_path"):
        words = small_run(model, **{name: model, "ckpt.overwrite": True})
        assert run_in_process("train_pipa", *words) == 1
        assert "error: --ckpt.output_dir" in capsys.readouterr().err
        assert (model / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [FULL, {"ds.lora.rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 3])
def test_lost_cache_is_computed_from_the_base_model(small_run, tmp_path, capsys, stage, changes):
    """After a resume the policy is no longer the prior."""
    changes = {**changes, "prior.model_name_or_path": None, "ds.zero_stage": stage}
    whole = train("train_pipa", *small_run("whole", **changes))
    cut(tmp_path / "whole", tmp_path / "cut", 4)
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    rows = train("train_pipa", *small_run("cut", **changes), "--ckpt.load_enable")
    assert "0 hits, 10 misses" in capsys.readouterr().out
    assert losses(rows) == pytest.approx(losses(whole), rel=1e-5)
    assert rows[-1]["logratio/chosen"] == pytest.approx(whole[-1]["logratio/chosen"], rel=1e-4)


def test_sft_and_evaluation_resume_too(small_run, tmp_path):
    data = write_jsonl(
        tmp_path / "sft.jsonl", [{"prompt": f"{n}:", "completion": "ab" * n, "label": 1} for n in (1, 2, 3)]
    )
    drop = {name: None for name in ("prior.model_name_or_path", "prior.cache_dir", "pipa.variant")}
    changes = {
        **drop,
        "data.dataset": data,
        "data.annotation": None,
        "train.batch_size": 2,
        "eval.dataset": data,
        "eval.steps": 1,
    }
    whole = train("train_sft", *small_run("whole", **changes))
    assert len(whole) == 4 and all(row["eval/loss"] > 0 for row in whole)
    cut(tmp_path / "whole", tmp_path / "cut", 1)
    rows = train("train_sft", *small_run("cut", **changes), "--ckpt.load_enable")
    for name in ("loss", "eval/loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole], rel=1e-6)


class Killed(Exception):
    """What a test makes happen at a moment when kill -9 could come."""


@pytest.mark.parametrize("moment", ["rename", "export"])
def test_the_export_of_a_step_is_whole_or_absent_and_made_up_for(small_run, tmp_path, monkeypatch, moment):
    """Killed after the checkpoint of a step, before or within its export: the resumed run has it like any other."""
    changes = {"ckpt.save_hf": True}
    train("train_pipa", *small_run("whole", **changes))

    def die_at_step_3(*words, real):
        if any("global_step3_hf" in str(word) for word in words):
            raise Killed
        return real(*words)

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(os, "rename", partial(die_at_step_3, real=os.rename))
        else:
            patch.setattr(export, "save_value_head", partial(die_at_step_3, real=export.save_value_head))
        with pytest.raises(Killed):
            train("train_pipa", *small_run("cut", **changes))
    assert "global_step3" in checkpoints(tmp_path / "cut") and "global_step3_hf" not in checkpoints(tmp_path / "cut")
    train("train_pipa", *small_run("cut", **changes), "--ckpt.load_enable")
    assert checkpoints(tmp_path / "cut") == checkpoints(tmp_path / "whole")
    for step in range(1, 7):
        whole, resumed = (tmp_path / name / "checkpoints" / f"global_step{step}_hf" for name in ("whole", "cut"))
        assert {path.name for path in whole.iterdir()} == {path.name for path in resumed.iterdir()}
        assert_same_end(whole, resumed)


@pytest.mark.parametrize("moment", ["before", "within"])
def test_killed_when_the_last_checkpoint_is_deleted_a_run_is_finished(
    small_run, tmp_path, monkeypatch, capsys, moment
):
    """The checkpoint of the last step, which nobody asked for, is there until the run is known to be finished."""
    words, real = small_run("out", **{"ckpt.save_steps": None}), shutil.rmtree

    def die(*words):
        raise Killed

    def die_half_way(path, **options):
        if str(path).endswith("global_step6.unfinished"):
            os.remove(os.path.join(path, "state.json"))
            raise Killed
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*((run, "drop_rescue", die) if moment == "before" else (shutil, "rmtree", die_half_way)))
        with pytest.raises(Killed):
            train("train_pipa", *words)
    assert len(checkpoints(tmp_path / "out")) == 1
    capsys.readouterr()
    train("train_pipa", *words, "--ckpt.load_enable")
    assert "finished after 6 steps" in capsys.readouterr().out


class AsIfWithMuon(Callback):
    """Stopped after its first step; DeepSpeed would compile the optimizer itself for minutes."""

    def on_train_begin(self, trainer) -> None:
        trainer.config = updated(trainer.config, {"optim": "muon"})

    def on_step_end(self, trainer, row) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_muon_is_stopped_without_a_checkpoint(small_run, tmp_path, capsys):
    """Its momentum has no place in one: a signal ends the run in one clear line."""
    words = small_run("out", **{"ckpt.save_steps": None})
    assert run_in_process("train_pipa", *words, callbacks=[AsIfWithMuon()]) == 130
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopped after step")]
    assert len(said) == 1 and "no checkpoint was written: --optim muon" in said[0]
    assert not (tmp_path / "out" / "checkpoints").exists()
