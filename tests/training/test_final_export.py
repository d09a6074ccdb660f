"""What would fail at the end of a run fails at its start; what fails at its end loses nothing."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_jsonl, run_in_process, train
from torch.utils import cpp_extension
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.distributed.strategy import on_cpu
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.training import export
from pipa_openrlhf.training.trainer import Callback, PreferenceTrainer

GIGABYTE = 10**9
NEVER = {"ckpt.save_steps": None}


def no_space(*args):
    raise OSError(28, "No space left on device")


def compiled(*args, **options):
    raise AssertionError("on CPU nothing has to be compiled")


class NothingLeftToTrain(Callback):
    """Refuses every update."""

    def on_update_begin(self, trainer) -> None:
        raise AssertionError(f"a step was trained after {trainer.position}")


def one_error(capsys) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    return errors[0]


def test_an_export_that_cannot_work_is_refused_before_training(small_run, tmp_path, capsys, monkeypatch):
    def refuse(self, folder, **options):
        raise ValueError("this tokenizer cannot be written\nby this version")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refuse)
    assert run_in_process("train_pipa", *small_run("out", **NEVER)) == 1
    error = one_error(capsys)
    assert "could not be exported" in error and error.endswith("this tokenizer cannot be written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, needed",
    [
        # 13,456 parameters of the model (and 289 of a value head that no check counts): weights, master and moments.
        ({}, 13_456 * (4 + 12)),
        ({"ckpt.disable_ds": True}, 13_456 * 4),
        ({"ds.lora.rank": 2}, 1_088 * (4 + 12)),
        ({"ds.lora.rank": 2, "ckpt.merge_lora": True}, 13_456 * 4 + 1_088 * 12),
    ],
    ids=["full", "no checkpoint", "lora", "merged"],
)
def test_a_disk_without_room_is_refused_before_training(small_run, capsys, monkeypatch, changes, needed):
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: free)
    assert run_in_process("train_pipa", *small_run("out", **NEVER, **changes)) == 1
    error = one_error(capsys)
    assert "GB free" in error and "--ckpt.output_dir" in error
    free.free = needed
    assert run_in_process("train_pipa", *small_run("out", **NEVER, **changes)) == 0


@pytest.mark.parametrize("changes", [{}, {"ds.lora.rank": 2, "ds.zero_stage": 3}], ids=["full", "lora"])
def test_a_failed_export_goes_on_from_its_checkpoint(small_run, tmp_path, capsys, monkeypatch, changes):
    train("train_pipa", *small_run("whole", **NEVER, **changes))
    assert not (tmp_path / "whole" / "checkpoints").exists()

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_value_head", no_space)
        assert run_in_process("train_pipa", *small_run("out", **NEVER, **changes)) == 1
    error = one_error(capsys)
    assert "No space left on device" in error and "global_step6" in error and "--ckpt.load_enable" in error

    rows = train(
        "train_pipa", *small_run("out", **NEVER, **changes), "--ckpt.load_enable", callbacks=[NothingLeftToTrain()]
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows == read_jsonl(tmp_path / "out/metrics.jsonl")
    assert not (tmp_path / "out" / "checkpoints").exists()
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    whole, resumed = (load_file(tmp_path / folder / name) for folder in ("whole", "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert "| loss |" in (tmp_path / "out" / "README.md").read_text()


def test_checkpoints_that_were_asked_for_stay(small_run, tmp_path):
    train("train_pipa", *small_run("all", **{"ckpt.save_steps": 3}))
    assert {path.name for path in (tmp_path / "all" / "checkpoints").iterdir()} == {"global_step3", "global_step6"}
    train("train_pipa", *small_run("four", **{"ckpt.save_steps": 4, "ckpt.max_num": 1}))
    assert {path.name for path in (tmp_path / "four" / "checkpoints").iterdir()} == {"global_step4"}


@pytest.mark.parametrize("changes", [{"ckpt.disable_ds": True}, {"optim": "muon"}], ids=["disabled", "muon"])
def test_without_checkpoints_the_line_says_so(small_run, tmp_path, capsys, monkeypatch, changes):
    monkeypatch.setattr(export, "save_value_head", no_space)
    if on_cpu():
        monkeypatch.setattr(cpp_extension, "load", compiled)
    assert run_in_process("train_pipa", *small_run("out", **NEVER, **changes, **{"ds.zero_stage": 2})) == 1
    assert "nothing is kept" in one_error(capsys)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_what_was_trained_is_exported_where_the_last_checkpoint_cannot_be_written(
    small_run, tmp_path, monkeypatch, log_lines
):
    """As with checkpoints on a disk that is full, or that not all nodes see."""

    def refuse(*args, **options):
        raise UserError("the disk does not take it")

    monkeypatch.setattr(PreferenceTrainer, "save_checkpoint", refuse)
    train("train_pipa", *small_run("out", **NEVER))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert any("No checkpoint of the last step: the disk does not take it" in line for line in log_lines)
