"""Runs that are cut short, and what is left of them."""

import json
import os
import shutil

from safetensors.torch import load_file

from pipa_openrlhf.training.run_folder import MANIFEST


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


def checkpoints(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))
