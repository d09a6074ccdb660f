"""A run deletes and writes over what runs of ours wrote, and nothing else."""

import json
import os
import shutil

import pytest
from tiny import run_in_process, save_adapter, train

from pipa_openrlhf.training.run_folder import MANIFEST
from pipa_openrlhf.training.trainer import Callback

LORA = {"ds.lora.rank": 2}
QUICK = {"train.max_epochs": 1, "ckpt.save_steps": 2}


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def snapshot(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def manifest(folder) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def refusal(capsys, words) -> str:
    capsys.readouterr()
    assert run_in_process("train_pipa", *words) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert "Train step" not in captured.err
    return line


@pytest.mark.parametrize("start", ["model", "adapter"])
@pytest.mark.parametrize("changes", [{}, LORA, {**LORA, "ckpt.merge_lora": True}], ids=["full", "lora", "merged"])
def test_manifest_lists_all_that_a_run_wrote(small_run, tiny_models, tmp_path, start, changes):
    if start == "adapter":
        save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
        changes = {**changes, "model.model_name_or_path": tmp_path / "adapter"}
        if "ds.lora.rank" not in changes:
            pytest.skip("full fine-tuning of an adapter writes what a model's does")
    train("train_pipa", *small_run("out", **{**QUICK, **changes, "ckpt.save_hf": True}))
    listed = manifest(tmp_path / "out")
    assert set(listed["files"]) == files(tmp_path / "out") - {MANIFEST}
    assert listed["is_open"] is False
    train("train_pipa", *small_run("out", **QUICK, **LORA), "--ckpt.overwrite")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert set(manifest(tmp_path / "out")["files"]) == files(tmp_path / "out") - {MANIFEST}


def test_overwrite_leaves_what_it_did_not_write(small_run, tmp_path):
    train("train_pipa", *small_run("out", **QUICK))
    mine = ["notes.txt", "extra.json", "checkpoints/mine/model.safetensors", "more/config.json"]
    for name in mine:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    train("train_pipa", *small_run("out", **QUICK, **LORA), "--ckpt.overwrite")
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in mine)
    assert not set(mine) & set(manifest(tmp_path / "out")["files"])


class KilledAtExport(Callback):
    """Dies with a part of the model written."""

    def on_export_begin(self, trainer, folder) -> None:
        with open(os.path.join(folder, "model-00001-of-00002.safetensors"), "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt


def test_a_run_that_was_killed_is_overwritten_too(small_run, tmp_path):
    assert run_in_process("train_pipa", *small_run("out", **QUICK), callbacks=[KilledAtExport()]) == 130
    assert manifest(tmp_path / "out")["is_open"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    train("train_pipa", *small_run("out", **QUICK, **LORA), "--ckpt.overwrite")
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "checkpoints/global_step2_hf/x.bin"])
@pytest.mark.parametrize(
    "way", [[], ["--ckpt.overwrite"], ["--ckpt.load_enable"]], ids=["plain", "overwrite", "resume"]
)
def test_a_file_of_the_users_is_not_written_over(small_run, tmp_path, capsys, monkeypatch, name, way):
    """As with --ckpt.output_dir . in a project."""
    project = tmp_path / "project"
    (project / name).parent.mkdir(parents=True)
    (project / name).write_text("mine")
    monkeypatch.chdir(project)
    line = refusal(capsys, [*small_run("out", **{**QUICK, "ckpt.output_dir": "."}), *way])
    assert name in line and MANIFEST in line
    assert snapshot(project) == {name: b"mine"}


def test_overwrite_after_a_file_of_the_users_came_in(small_run, tmp_path, capsys):
    train("train_pipa", *small_run("out", **QUICK, **LORA))
    (tmp_path / "out" / "config.json").write_text("mine")
    before = snapshot(tmp_path / "out")
    assert "config.json" in refusal(capsys, [*small_run("out", **QUICK), "--ckpt.overwrite"])
    assert snapshot(tmp_path / "out") == before


INPUTS = {
    "export as model": ({"model.model_name_or_path": "checkpoints/global_step2_hf"}, "--model.model_name_or_path"),
    "export as prior": ({"prior.model_name_or_path": "checkpoints/global_step2_hf"}, "--prior.model_name_or_path"),
    "value head": ({"value.init_from": "checkpoints/global_step2_hf"}, "--value.init_from"),
    "data": ({"data.dataset": "metrics.jsonl"}, "--data.dataset"),
    "one of two data sets": ({"data.dataset": "{data},metrics.jsonl"}, "--data.dataset"),
    "evaluation": ({"eval.dataset": "metrics.jsonl"}, "--eval.dataset"),
    "through a link": ({"model.model_name_or_path": "../link"}, "--model.model_name_or_path"),
    "base of an adapter": ({"model.model_name_or_path": "../adapter"}, "--model.model_name_or_path"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_overwrite_never_deletes_an_input_of_the_run(small_run, tmp_path, capsys, case):
    export = tmp_path / "out" / "checkpoints" / "global_step2_hf"
    train("train_pipa", *small_run("out", **QUICK, **{"ckpt.save_hf": True}))
    os.symlink(export, tmp_path / "link")
    save_adapter(export, tmp_path / "adapter", 1)
    changes, named = INPUTS[case]
    data = tmp_path / "data.jsonl"
    changes = {
        flag: ",".join(
            str(data) if part == "{data}" else os.path.normpath(tmp_path / "out" / part) for part in value.split(",")
        )
        for flag, value in changes.items()
    }
    before = snapshot(tmp_path / "out")
    line = refusal(capsys, [*small_run("out", **{**QUICK, **changes}), "--ckpt.overwrite"])
    assert line.startswith("error: --ckpt.overwrite would delete ") and named in line
    assert snapshot(tmp_path / "out") == before


def test_checkpoints_kept_elsewhere_have_their_own_manifest(small_run, tmp_path, capsys):
    elsewhere = {**QUICK, "ckpt.path": tmp_path / "kept"}
    train("train_pipa", *small_run("one", **elsewhere))
    assert set(manifest(tmp_path / "kept")["files"]) == files(tmp_path / "kept") - {MANIFEST}
    assert "holds another run" in refusal(capsys, small_run("two", **elsewhere))
    # Another output folder goes on from the same checkpoints.
    rows = train("train_pipa", *small_run("two", **{**elsewhere, "train.max_epochs": 2}), "--ckpt.load_enable")
    assert len(rows) == 4
    shutil.rmtree(tmp_path / "two")
    train("train_pipa", *small_run("two", **elsewhere, **LORA), "--ckpt.overwrite")
    assert set(manifest(tmp_path / "kept")["files"]) == files(tmp_path / "kept") - {MANIFEST}


def test_damaged_manifest_is_one_line(small_run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for text in ("", "[]", "{}", '{"files": 1, "is_open": false}'):
        (tmp_path / "out" / MANIFEST).write_text(text)
        assert MANIFEST in refusal(capsys, [*small_run("out", **QUICK), "--ckpt.overwrite"])
