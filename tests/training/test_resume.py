"""A run that was cut anywhere goes on as if it had not been."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from safetensors.torch import load_file
from tiny import read_jsonl, run_in_process, start_module, train, write_jsonl

from pipa_openrlhf import lag
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import updated
from pipa_openrlhf.training import checkpoint, export, run, trainer
from pipa_openrlhf.training.engine_state import EngineState
from pipa_openrlhf.training.run_folder import MANIFEST
from pipa_openrlhf.training.trainer import Callback

FULL = {}
LORA = {"ds.lora.rank": 4, "ds.lora.dropout": 0.2}


def losses(rows) -> list[float]:
    return [row["loss"] for row in rows]


def cut(whole, copy, step: int) -> None:
    """What a run killed some time after its checkpoint of ``step`` leaves behind."""
    copy.mkdir()
    for kept in range(1, step + 1):
        shutil.copytree(whole / "checkpoints" / f"global_step{kept}", copy / "checkpoints" / f"global_step{kept}")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step + 1]) + lines[-1][:20])
    args = json.loads((whole / "args.json").read_text())
    del args["resolved.finished"]
    (copy / "args.json").write_text(json.dumps(args))
    (copy / MANIFEST).write_text(json.dumps({"is_open": True, "files": []}))


def assert_same_end(whole, resumed) -> None:
    for name in ("adapter_model.safetensors", "model.safetensors", "value_head.safetensors"):
        if (whole / name).exists():
            expected, got = load_file(whole / name), load_file(resumed / name)
            assert expected.keys() == got.keys()
            assert all(((expected[key] - got[key]).abs().max() < 1e-6) for key in expected), name


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


def damage(path, how: str) -> None:
    """Remove a file, cut its end off, or flip one of its bits: the lowest of a byte in its middle."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


FILES = ["trainable-00000-00000.safetensors", "rng.safetensors", "state.json", "checksums.json"]


def test_a_checkpoint_of_an_earlier_format_is_said_to_be_one(tmp_path):
    before = tmp_path / "global_step3"
    before.mkdir()
    for name in ("trainable.safetensors", "state.json"):
        (before / name).write_text("{}")
    sums = {name: hashlib.sha256(b"{}").hexdigest() for name in ("trainable.safetensors", "state.json")}
    (before / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match="earlier version"):
        checkpoint.newest_checkpoint(str(tmp_path), SimpleNamespace(from_rank_0=lambda function: function()))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_damaged_checkpoint_is_passed_over(small_run, tmp_path, capsys, file, how):
    whole = train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 3)
    path = tmp_path / "cut" / "checkpoints" / "global_step3" / file
    damage(path, how)
    capsys.readouterr()
    rows = train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "damaged and not used" in line]
    assert line.startswith(f"{path.parent} is damaged and not used (")
    assert "looking for the one before" in line
    if how == "delete":
        assert f"({file} is missing" in line and ("earlier version" in line) == (file == "checksums.json")
    elif file != "checksums.json":
        assert f"({file} is not what was written)" in line
    assert any("after step 2 of 6" in line for line in said)
    assert losses(rows) == pytest.approx(losses(whole), rel=1e-6)


def test_two_ranks_pass_over_a_checkpoint_whose_damage_the_second_one_finds(small_run, two_ranks, tmp_path):
    """Sorted by name, every second file is rank 1's."""
    changes = {"ds.zero_stage": 2}
    assert two_ranks("train_pipa", *small_run("whole", **changes)).returncode == 0
    cut(tmp_path / "whole", tmp_path / "cut", 3)
    newest = tmp_path / "cut" / "checkpoints" / "global_step3"
    assert sorted(os.listdir(newest)).index("trainable-00001-00000.safetensors") == 4  # after checksums.json
    damage(newest / "trainable-00001-00000.safetensors", "flip")
    result = two_ranks("train_pipa", *small_run("cut", **changes), "--ckpt.load_enable")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "not used (trainable-00001-00000.safetensors is not what was written): looking" in result.stdout
    assert "after step 2 of 6" in result.stdout
    rows, expected = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-6)


class RankOf:
    """One of several ranks that are called one after the other; what it tells the others is kept in ``told``."""

    def __init__(self, rank: int, world_size: int):
        self.world_size, self.get_rank, self.told = world_size, lambda: rank, []

    def from_rank_0(self, function):
        return function()

    def all_gather_object(self, found: list, mine) -> None:
        self.told.append(mine)
        found[self.get_rank()] = mine


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_file_of_a_checkpoint_is_read_by_one_rank(tmp_path, monkeypatch, world_size):
    names = [f"trainable-0000{number}-00000.safetensors" for number in range(4)] + ["rng.safetensors", "state.json"]
    folder = tmp_path / "global_step3"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    (folder / "checksums.json").write_text(
        json.dumps({name: hashlib.sha256(name.encode()).hexdigest() for name in names})
    )
    (folder / "trainable-00002-00000.safetensors").write_text("another text")
    read, told = [], []

    def sha256(path):
        read.append(os.path.basename(path))
        return hashlib.sha256(open(path, "rb").read()).hexdigest()

    monkeypatch.setattr(checkpoint, "file_sha256", sha256)
    for rank in range(world_size):
        one, before = RankOf(rank, world_size), len(read)
        monkeypatch.setattr(torch.distributed, "all_gather_object", one.all_gather_object)
        checkpoint._damage(str(folder), one)
        told += one.told
        assert len(read) - before <= -(-len(names) // world_size)
    # Of a damaged file's rank, those after it are not read.
    assert len(read) == len(set(read)) and set(read) | {"state.json", "trainable-00003-00000.safetensors"} >= set(
        names
    )
    assert [one for one in told if one] == ["trainable-00002-00000.safetensors is not what was written"]


def test_a_half_copied_checkpoint_is_passed_over(small_run, tmp_path, capsys):
    train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 3)
    folder = tmp_path / "cut" / "checkpoints" / "global_step3"
    content = (folder / "trainable-00000-00000.safetensors").read_bytes()
    (folder / "trainable-00000-00000.safetensors").write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    assert "global_step3 is damaged and not used (trainable-00000-00000.safetensors is not" in capsys.readouterr().out


def test_no_checkpoint_is_left_that_is_whole(small_run, tmp_path, capsys):
    """It is said, and nothing is deleted: the run does not start again from the beginning by itself."""
    train("train_pipa", *small_run("out", **{"ckpt.max_num": 1}))
    assert checkpoints(tmp_path / "out") == ["global_step6"]
    damage(tmp_path / "out" / "checkpoints" / "global_step6" / "trainable-00000-00000.safetensors", "flip")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    words = small_run("out", **{"ckpt.max_num": 1, "train.max_epochs": 3, "ckpt.load_enable": True})
    assert run_in_process("train_pipa", *words) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "has no whole checkpoint (global_step6: trainable-00000-00000.safetensors is not what was written)" in error
    assert "--ckpt.overwrite" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_checkpoint_waits_for_a_part_that_a_file_server_shows_late(tmp_path):
    final = str(tmp_path / "global_step1")
    os.makedirs(f"{final}.unfinished")
    hidden = tmp_path / "trainable-00001-00000.safetensors"
    hidden.write_text("of another node")
    shown = f"{final}.unfinished/{hidden.name}"
    digest = hashlib.sha256(hidden.read_bytes()).hexdigest()
    parts = [{"checksums": {}, "rng": {}}, {"checksums": {hidden.name: digest}, "rng": {"torch": torch.zeros(1)}}]
    late = threading.Timer(0.7, os.rename, (hidden, shown))
    late.start()
    checkpoint._finish(final, parts, {"step": 1})
    late.join()
    assert (tmp_path / "global_step1" / hidden.name).read_text() == "of another node"
    assert json.loads((tmp_path / "global_step1" / "checksums.json").read_text())[hidden.name] == digest


def test_a_part_that_never_comes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lag, "LAG", 0.3)
    os.makedirs(tmp_path / "global_step1.unfinished")
    with pytest.raises(OSError, match="x.safetensors of another node is not there: --ckpt.path must be a folder"):
        checkpoint._finish(str(tmp_path / "global_step1"), [{"checksums": {"x.safetensors": ""}, "rng": {}}], {})


def test_a_rank_waits_for_a_checkpoint_that_another_one_sees(small_run, tmp_path, monkeypatch):
    """Found whole by the ranks that read it; here a file of it is hidden between that and loading it."""
    whole = train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 3)
    path = tmp_path / "cut" / "checkpoints" / "global_step3" / "trainable-00000-00000.safetensors"
    load = checkpoint.load_checkpoint

    def load_late(*arguments):
        os.rename(path, tmp_path / "hidden")
        late = threading.Timer(0.7, os.rename, (tmp_path / "hidden", path))
        late.start()
        try:
            return load(*arguments)
        finally:
            late.join()

    monkeypatch.setattr(trainer, "load_checkpoint", load_late)
    rows = train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    assert losses(rows) == pytest.approx(losses(whole), rel=1e-6)


def test_unfinished_folder_is_ignored(small_run, tmp_path):
    whole = train("train_pipa", *small_run("whole"))
    cut(tmp_path / "whole", tmp_path / "cut", 2)
    folder = tmp_path / "cut" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "global_step5", folder / "global_step5.unfinished")
    assert losses(train("train_pipa", *small_run("cut"), "--ckpt.load_enable")) == pytest.approx(losses(whole))
    assert [name for name in os.listdir(folder) if "unfinished" in name] == []


def test_without_a_checkpoint_it_starts_from_the_beginning(small_run, capsys):
    rows = train("train_pipa", *small_run("out"), "--ckpt.load_enable")
    assert len(rows) == 6
    assert "starting from step 0" in capsys.readouterr().out


def checkpoints(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


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


class _Engine:
    """What EngineState asks of a float16 engine, which no CPU runs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_optimization_stage(self) -> int:
        return 3


def _zero_scaler():
    return SimpleNamespace(
        loss_scaler=loss_scaler.DynamicLossScaler(
            init_scale=2**16, scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
    )


def _plain_scaler():
    return SimpleNamespace(loss_scale_config=loss_scaler.LossScaleConfig(torch.float16, True, 1.0, None))


@pytest.mark.parametrize("make", [_zero_scaler, _plain_scaler], ids=["ZeRO", "no ZeRO"])
def test_float16_goes_on_with_its_loss_scale(make, monkeypatch):
    """Through JSON, as in a checkpoint; then both take the same steps, with and without an overflow."""
    before, after = make(), make()
    scaler, restored = (next(iter(vars(one).values())) for one in (before, after))
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 512.0, 41, 38
    if make is _zero_scaler:
        scaler.cur_hysteresis = 1
    EngineState(_Engine(after)).loss_scale = json.loads(json.dumps(EngineState(_Engine(before)).loss_scale))
    assert vars(restored) == vars(scaler)
    if make is _zero_scaler:
        monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 0))
        for overflow in (False, False, False, True, False):
            for one in (scaler, restored):
                one.update_scale(overflow)
            assert vars(restored) == vars(scaler)
        assert scaler.cur_scale != 512.0


def test_checkpoint_keeps_the_loss_scale_and_gives_it_back(small_run, tmp_path, monkeypatch):
    kept, restored = {"cur_scale": 8.0, "cur_iter": 3}, []
    monkeypatch.setattr(EngineState, "loss_scale", property(lambda self: kept, lambda self, to: restored.append(to)))
    train("train_pipa", *small_run("whole"))
    assert restored == []
    cut(tmp_path / "whole", tmp_path / "cut", 2)
    train("train_pipa", *small_run("cut"), "--ckpt.load_enable")
    assert restored == [kept]
