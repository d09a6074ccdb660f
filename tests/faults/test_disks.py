"""A disk that is full or read-only, a real one: one clear line, nothing lost, and on it goes when there is room."""

import os
import subprocess
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_jsonl, run_in_process, train

from pipa_openrlhf.training import run
from pipa_openrlhf.training.trainer import Callback

_SMALL, _LARGE = "500k", "8m"


class Disk:
    """A file system of its own."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={_SMALL}", "tmpfs", path)

    def _run(self, *words) -> None:
        subprocess.run(list(map(str, words)), check=True, capture_output=True)

    def make_room(self) -> None:
        self._run("mount", "-o", f"remount,size={_LARGE}", self.path)

    def make_read_only(self, how: bool) -> None:
        self._run("mount", "-o", f"remount,{'ro' if how else 'rw'}", self.path)

    def fill(self) -> None:
        """Until not a byte is left."""
        with open(self.path / "filler", "wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    pass

    def take_away(self) -> None:
        self._run("umount", "--lazy", self.path)


@pytest.fixture
def disk(tmp_path):
    """A disk of half a megabyte."""
    try:
        small = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    yield small
    small.take_away()


def one_error(capsys, words, callbacks=()) -> str:
    """The line with which a run ends."""
    capsys.readouterr()
    assert run_in_process("train_pipa", *words, callbacks=callbacks) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    return errors[0]


def assert_same(whole, resumed) -> None:
    rows, expected = (read_jsonl(folder / "metrics.jsonl") for folder in (resumed, whole))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    weights, right = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(weights[name], right[name]) for name in right)


class FillAt(Callback):
    """Fills a disk at one of the run's moments."""

    def __init__(self, disk: Disk, moment: str):
        setattr(self, moment, lambda *words: disk.fill())


def test_no_room_for_a_checkpoint(small_run, tmp_path, capsys, disk):
    """A checkpoint has 170 kB."""
    changes = {"ckpt.path": disk.path / "kept"}
    train("train_pipa", *small_run("whole"))
    line = one_error(capsys, small_run("out", **changes))
    assert f"the checkpoint {disk.path / 'kept' / 'global_step3'} cannot be written" in line
    assert "No space left on device" in line and "--ckpt.load_enable" in line
    assert sorted(os.listdir(disk.path / "kept")) == ["global_step1", "global_step2", "run_manifest.json"]
    disk.make_room()
    train("train_pipa", *small_run("out", **changes), "--ckpt.load_enable")
    assert "after step 2 of 6" in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("moment", ["on_train_begin", "on_update_begin", "on_step_end", "on_export_begin"])
def test_no_room_in_the_output_folder(small_run, tmp_path, capsys, disk, moment):
    """For the metrics of the first step, for those of the second, and for the export."""
    changes = {"ckpt.path": tmp_path / "kept"}
    train("train_pipa", *small_run("whole"))
    line = one_error(capsys, small_run(disk.path / "out", **changes), [FillAt(disk, moment)])
    assert "No space left on device" in line
    assert str(disk.path / "out") in line
    disk.make_room()
    train("train_pipa", *small_run(disk.path / "out", **changes), "--ckpt.load_enable")
    assert_same(tmp_path / "whole", disk.path / "out")


def test_no_room_for_the_priors_cache(small_run, tmp_path, capsys, disk):
    changes = {"prior.cache_dir": disk.path / "cache"}
    train("train_pipa", *small_run("whole"))
    line = one_error(capsys, small_run("out", **changes), [FillAt(disk, "on_prior_begin")])
    assert f"cannot write the prior cache {disk.path / 'cache'}" in line and "No space left on device" in line
    disk.make_room()
    train("train_pipa", *small_run("out", **changes), "--ckpt.load_enable")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_read_only_output_folder(small_run, capsys, disk):
    disk.make_read_only(True)
    line = one_error(capsys, small_run(disk.path / "out"))
    assert f"--ckpt.output_dir {disk.path / 'out'} cannot be written to" in line


class ReadOnlyAtTheSecondStep(Callback):
    def __init__(self, disk: Disk):
        self.disk = disk

    def on_update_begin(self, trainer) -> None:
        if trainer.position.step == 1:
            self.disk.make_read_only(True)


def test_a_checkpoint_folder_that_becomes_read_only(small_run, tmp_path, capsys, disk, monkeypatch):
    """As Linux does with a disk that has errors, whoever has files open there; here an open lock would forbid it."""
    monkeypatch.setattr(run, "alone_in", lambda folder: nullcontext())
    disk.make_room()
    changes = {"ckpt.path": disk.path / "kept"}
    train("train_pipa", *small_run("whole"))
    line = one_error(capsys, small_run("out", **changes), [ReadOnlyAtTheSecondStep(disk)])
    assert "global_step2 cannot be written" in line and "Read-only file system" in line
    disk.make_read_only(False)
    train("train_pipa", *small_run("out", **changes), "--ckpt.load_enable")
    assert_same(tmp_path / "whole", tmp_path / "out")
