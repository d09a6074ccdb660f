"""The output folder: whose it is, and what an earlier run left there."""

import glob
import json
import os
import shutil
from types import SimpleNamespace

from pipa_openrlhf.errors import UserError

# Files that only a run leaves in its output folder.
_TRACES = ("args.json", "metrics.jsonl", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")
# Everything that a run writes there; --ckpt.overwrite touches nothing else.
_WRITTEN = (
    *_TRACES,
    "adapter_model*",
    "model*.safetensors",
    "config.json",
    "generation_config.json",
    "value_head*",
    "README.md",
    "merged_base*",
    ".export_trial_*",
)


def check_output_dir(args: SimpleNamespace, checkpoint_folder: str) -> None:
    """Refuse a folder that holds another run, unless told to resume or to delete it.

    Raises:
        UserError: names the folder and the ways out.
    """
    output_dir = args.ckpt.output_dir
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise UserError(f"--ckpt.output_dir {output_dir} is a file: give a folder")
    existing = os.path.abspath(output_dir)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--ckpt.output_dir {output_dir} cannot be written to: {existing} is not a writable folder")
    for name in ("model.model_name_or_path", "prior.model_name_or_path", "ref.model_name_or_path", "value.init_from"):
        path = args.flat.get(name)
        if path and os.path.realpath(path) == os.path.realpath(output_dir):
            raise UserError(f"--ckpt.output_dir {output_dir} is also --{name}: give another folder")
    if args.ckpt.overwrite or args.ckpt.load_enable:
        return
    if any(os.path.exists(os.path.join(output_dir, name)) for name in _TRACES) or (
        os.path.isdir(checkpoint_folder) and os.listdir(checkpoint_folder)
    ):
        raise UserError(
            f"--ckpt.output_dir {output_dir} holds another run: resume it with --ckpt.load_enable, delete it with "
            "--ckpt.overwrite, or give another folder"
        )


def finished_steps(output_dir: str) -> int | None:
    """Optimizer steps of the finished run in ``output_dir``; None where there is none."""
    try:
        with open(os.path.join(output_dir, "args.json")) as file:
            record = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record.get("resolved.total_steps") if record.get("resolved.finished") else None


def delete_run(output_dir: str, checkpoint_folder: str) -> None:
    """Delete what a run wrote to its output and checkpoint folders, and nothing else."""
    paths = {path for name in _WRITTEN for path in glob.glob(os.path.join(glob.escape(output_dir), name))}
    paths.update(glob.glob(os.path.join(glob.escape(checkpoint_folder), "global_step*")))
    for path in paths:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
