"""The jobs that are killed: each a command as a user gives it, the writes it can be killed in, and what it must leave.

They are small in steps and have many moments of writing: a checkpoint after every step or every few, a cache, exports.
"""

import glob
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from tiny import flags, make_model, make_tokenizer, read_jsonl, save_adapter, write_jsonl

_TRAINED = ("adapter_model.safetensors", "model.safetensors", "value_head.safetensors")
_RESULTS = {"evaluate": "out/results.jsonl", "sample": "out.jsonl"}
_TOLERANCE = 1e-6  # of a float32 weight or loss


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        module: of the command line.
        settings: flags beside those that all jobs of the module share.
        ranks: of the launcher; 0: ``python -m``.
        writes: glob patterns below the job's folder of what is there while it writes, by what is written.
        on_ray: started by launch_ray on a cluster of its own; otherwise ranks are deepspeed's.
    """

    name: str
    module: str
    settings: dict
    ranks: int = 0
    writes: dict[str, str] = field(default_factory=dict)
    on_ray: bool = False


CHECKPOINT = "out/checkpoints/global_step*[0-9].unfinished"
_CHECKPOINT = {"a checkpoint": CHECKPOINT}
_CACHE = {"the prior's cache": "cache/v1/*/*.unfinished"}
_MERGED = {"the merged base": "out/merged_base.unfinished"}
# These appear under their own names; the run counts as finished only after all of them.
_ADAPTER, _FULL = {"the export": "out/adapter_model.safetensors"}, {"the export": "out/model.safetensors"}
_LORA = {"ds.lora.rank": 4, "ds.lora.dropout": 0.2}

JOBS = (
    Job("two ranks, LoRA, ZeRO-3", "train_pipa", {**_LORA, "ds.zero_stage": 3}, 2, _CHECKPOINT | _ADAPTER),
    Job("full fine-tuning", "train_pipa", {"ckpt.save_hf": True, "ckpt.save_steps": 5}, 0, _CHECKPOINT | _FULL),
    Job("prior pass", "train_pipa", {**_LORA, "data.dataset": "many.jsonl", "train.batch_size": 500}, 0, _CACHE),
    Job("evaluation", "evaluate", {"evaluate.decode": "sample", "evaluate.num_answers": 2}),
    Job(
        "from an adapter",
        "train_pipa",
        {**_LORA, "ckpt.save_steps": 3, "model.model_name_or_path": "adapter"},
        0,
        _MERGED | _ADAPTER,
    ),
    Job("sampling", "sample", {"sample.num_answers": 2}),
    Job(
        "two ranks, full, ZeRO-2",
        "train_pipa",
        {"ds.zero_stage": 2, "ckpt.save_steps": 4},
        2,
        _CHECKPOINT | _CACHE | _FULL,
    ),
    Job("Ray, LoRA, ZeRO-2", "train_pipa", {**_LORA, "ds.zero_stage": 2}, 2, _CHECKPOINT | _CACHE | _ADAPTER, True),
)


def make_inputs(folder: Path) -> None:
    """Models, data and problems of all jobs."""
    for name, seed in (("policy", 0), ("prior", 1)):
        make_model(seed, hidden_size=64, intermediate_size=128).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    save_adapter(folder / "policy", folder / "adapter", seed=2)
    make_tokenizer().save_pretrained(folder / "adapter")
    write_jsonl(folder / "data.jsonl", [_answer(n) for n in range(80)])
    write_jsonl(folder / "many.jsonl", [_answer(n) for n in range(1000)])
    write_jsonl(folder / "problems.jsonl", [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(100)])


def command(job: Job, inputs: Path, folder: Path, port: int) -> list[str]:
    """The words that start ``job`` with everything that it writes in ``folder``; the same ones start it again."""
    made = {name: inputs / name for name in os.listdir(inputs)}
    shared = _training(made, folder) if job.module == "train_pipa" else _generating(job.module, made, folder)
    settings = {
        name: made.get(value, value) if isinstance(value, str) else value for name, value in job.settings.items()
    }
    module = f"pipa_openrlhf.cli.{job.module}"
    words = flags({**shared, **settings})
    if job.on_ray:
        launcher = ["--ray.num_workers", str(job.ranks), "--ray.max_failures", "3", "--ray.address", "local", "--"]
        return [sys.executable, "-m", "pipa_openrlhf.cli.launch_ray", *launcher, module, *words]
    if not job.ranks:
        return [sys.executable, "-m", module, *words]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(job.ranks), "--master_port", str(port), "--module", module, *words]


def _answer(n: int) -> dict:
    completions = ["x" * (n % 4 + 1), f"so {n + n + n % 3}"]
    return {"prompt": f"{n}+{n}?\n", "completions": completions, "labels": [n % 4 > 0, n % 3 == 0]}


def _training(made: dict[str, Path], folder: Path) -> dict:
    return {
        "model.model_name_or_path": made["policy"],
        "prior.model_name_or_path": made["prior"],
        "prior.cache_dir": folder / "cache",
        "data.cache_dir": folder / "prepared",
        "data.dataset": made["data.jsonl"],
        "data.annotation": "step",
        "pipa.variant": "n",
        "ds.param_dtype": "fp32",
        "ds.zero_stage": 0,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.max_epochs": 2,
        "adam.lr": 1e-3,
        "ckpt.save_steps": 1,
        "ckpt.load_enable": True,
        "ckpt.output_dir": folder / "out",
    }


def _generating(module: str, made: dict[str, Path], folder: Path) -> dict:
    size, tokens = f"{module}.batch_size", f"{module}.max_new_tokens"
    output = (
        {"evaluate.output_dir": folder / "out"} if module == "evaluate" else {"sample.output": folder / "out.jsonl"}
    )
    shared = {"model.model_name_or_path": made["policy"], "problems.file": made["problems.jsonl"]}
    return {**shared, "data.input_template": "{}\n", "ds.param_dtype": "fp32", size: 8, tokens: 32, **output}


def steps_done(folder: Path) -> int:
    """Optimizer steps that are in the metrics."""
    path = folder / "out" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def work_done(job: Job, folder: Path) -> int:
    """Optimizer steps, or answers that are on disk."""
    if job.module == "train_pipa":
        return steps_done(folder)
    # Ranks of one job write to files of their own.
    paths = [one for one in folder.glob(f"{_RESULTS[job.module]}*") if not one.name.endswith(".json")]
    return sum(path.read_text().count("\n") for path in paths)


def last_kept(folder: Path) -> float:
    """When something was written that a restart goes on from, in seconds of the clock; 0: nothing yet."""
    patterns = ("out/checkpoints/global_step*", "cache/v1/*/*.safetensors", *(f"{one}*" for one in _RESULTS.values()))
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.suffix != ".unfinished"]
    return max((path.stat().st_ctime for path in found), default=0.0)


def is_finished(folder: Path) -> bool:
    """Whether a training job says that its export is complete."""
    try:
        return bool(json.loads((folder / "out" / "args.json").read_text()).get("resolved.finished"))
    except (OSError, ValueError):
        return False


def is_writing(folder: Path, pattern: str) -> bool:
    """Whether the job writes what leaves a trace of this ``pattern``."""
    return bool(glob.glob(str(folder / pattern))) and not is_finished(folder)


def difference(job: Job, folder: Path, undisturbed: Path) -> str | None:
    """What a job that was killed and started again left otherwise than one that was not; None: nothing."""
    if job.module != "train_pipa":
        name = _RESULTS[job.module]
        rows, expected = (sorted((one / name).read_text().splitlines()) for one in (folder, undisturbed))
        return None if rows == expected else f"{name} differs"
    rows, expected = (read_jsonl(one / "out" / "metrics.jsonl") for one in (folder, undisturbed))
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        return "steps are missing or doubled in metrics.jsonl"
    if any(abs(row["loss"] - one["loss"]) > _TOLERANCE for row, one in zip(rows, expected)):
        return "the losses differ"
    return _different_folders(folder, undisturbed) or _leftover(folder)


def _different_folders(folder: Path, undisturbed: Path) -> str | None:
    """Of weights: their largest difference where that is too much, in the export and in those of single steps."""
    names = {path.relative_to(undisturbed) for name in _TRAINED for path in undisturbed.glob(f"out/**/{name}")}
    if names != {path.relative_to(folder) for name in _TRAINED for path in folder.glob(f"out/**/{name}")}:
        return "other files were exported"
    for name in sorted(names):
        got, expected = load_file(folder / name), load_file(undisturbed / name)
        if got.keys() != expected.keys():
            return f"{name} holds other tensors"
        worst = max(float((got[key] - expected[key]).abs().max()) for key in got)
        if not worst <= _TOLERANCE:
            return f"{name} differs by {worst:.2g}"
    return None


def _leftover(folder: Path) -> str | None:
    left = [
        path for path in (folder / "out").rglob("*") if ".unfinished" in path.name or path.name.startswith(".export")
    ]
    return f"{left[0].relative_to(folder)} was left behind" if left else None


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
