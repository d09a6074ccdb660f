"""A checkpoint that is damaged, half there or late is never used as if it were whole."""

import hashlib
import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from cut_runs import checkpoints, cut, losses
from tiny import read_jsonl, run_in_process, train

from pipa_openrlhf import lag
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.training import checkpoint, trainer


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
