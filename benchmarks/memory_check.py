"""Real training steps in fresh processes: their peak memory beside the estimate. Also the worker of one such run.

python benchmarks/memory_check.py ours|openrlhf RESULT FLAGS...      (started by memory_7b.py)
"""

import json
import os
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from inputs import EOS, Problem, byte_tokenizer, write_data
from measure import PeakMemory
from memory_states import our_bucket, states, upstream_bucket
from memory_steps import Step, llama, openrlhf_dpo_step, our_step
from transformers import LlamaForCausalLM

from pipa_openrlhf.distributed.upstream import flash_attn_installed

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
STEPS = 2  # Adam's moments exist from the first update on
MODELS = {
    "tiny": (16, 32, 2, 2, 2, 260),
    "small": (320, 864, 12, 5, 5, 12288),
    "135m": (576, 1536, 30, 9, 3, 49152),
}
# Freed tensors go back to the system at once, so that resident memory is what is alive; for both arms.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def check(cases: list[tuple[str, int, int, bool]]) -> list[dict]:
    """Estimate and measurement of ours (PIPA-M) and OpenRLHF's train_dpo: bf16, LoRA, ZeRO-2, one rank.

    Args:
        cases: (model, sequences of the only micro-batch, their length, checkpointing).

    Returns:
        Two rows a case, ours first; ``process`` is what a run of hardly any weights takes above its imports, and is
        not in ``measured``.
    """
    rows = []
    process = {arm: _measure(Step(_config("tiny"), "bf16", 4, 64), arm) for arm in ("ours", "openrlhf")}
    for model, sequences, length, checkpointing in cases:
        step = Step(_config(model), "bf16", sequences, length, checkpointing=checkpointing)
        case = {"model": model, "sequences": sequences, "length": length, "checkpointing": checkpointing}
        for arm in ("ours", "openrlhf"):
            print(f"measuring {arm} on {model}, {sequences} x {length}", file=sys.stderr, flush=True)
            measured = _measure(step, arm) - process[arm]
            rows.append({**case, "arm": arm, "estimate": _estimate(step, arm), "measured": measured})
            rows[-1]["process"] = process[arm]
    return rows


def _estimate(step: Step, arm: str) -> int:
    if arm == "ours":
        found = our_step(step)
        bucket = our_bucket(found.trained)
    else:
        found, bucket = openrlhf_dpo_step(step, flash_attn_installed()), upstream_bucket()
    return states(found, 2, 1, bucket, touched_only=not torch.cuda.is_available()).peak(found)


def _measure(step: Step, arm: str) -> int:
    """Bytes above the imports at the peak of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _make_inputs(work, step)
        command = [sys.executable, __file__, arm, str(work / "peaks.json"), *_flags(work, step, arm)]
        environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ended.returncode:
            raise SystemExit(f"{arm} failed:\n{ended.stdout[-3000:]}")
        return max(json.loads((work / "peaks.json").read_text()))


def _flags(work: Path, step: Step, arm: str) -> list[str]:
    # OpenRLHF counts pairs, and wants the final eos in the text.
    units, data = (step.sequences, "answers") if arm == "ours" else (step.sequences // 2, "openrlhf")
    words = (
        f"--model.model_name_or_path {work / 'model'} --data.dataset {work / data}.jsonl --data.prompt_key prompt "
        f"--data.max_len 4096 --train.batch_size {units} --train.micro_batch_size {units} --train.max_epochs 1 "
        f"--ds.param_dtype {step.dtype} --ds.zero_stage 2 --ds.lora.rank {step.lora_rank} "
        f"--ds.attn_implementation {'flash_attention_2' if flash_attn_installed() else 'sdpa'} "
        f"--ckpt.output_dir {work / 'trained'}"
    )
    checkpointing = ["--model.gradient_checkpointing_enable"] if step.checkpointing else []
    cache = ["--prior.cache_dir", str(work / "cache")] if arm == "ours" else []
    return [*words.split(), *checkpointing, *cache]


def _make_inputs(work: Path, step: Step) -> None:
    """A random model, and data of ``STEPS`` steps of sequences that are all exactly as long as the step says."""
    torch.manual_seed(0)
    LlamaForCausalLM(step.config).to(torch.bfloat16).save_pretrained(work / "model")
    byte_tokenizer().save_pretrained(work / "model")
    rng = random.Random(0)
    prompt = int(step.length * step.prompt_share)
    answer = step.length - prompt - 1  # the last token is eos

    def text(size: int) -> str:
        return "".join(rng.choices(string.ascii_letters, k=size))

    count = STEPS * step.sequences // 2
    write_data(work, [Problem(text(prompt), [text(answer), text(answer)], [1, 0]) for _ in range(count)], EOS)


def _config(model: str):
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return llama(*MODELS[model], tie_word_embeddings=True, **ids)


def _measure_ours(flags: list[str], peaks: list[int]) -> None:
    from pipa_openrlhf.cli import train_pipa
    from pipa_openrlhf.cli.args import parse_args
    from pipa_openrlhf.trainer import run  # noqa: F401  what main imports counts as an import
    from pipa_openrlhf.trainer.preference_trainer import PreferenceTrainer

    memory = PeakMemory()
    train_step = PreferenceTrainer._train_step

    def measured(self, *args):
        memory.reset()
        row = train_step(self, *args)
        peaks.append(memory.peak())
        return row

    PreferenceTrainer._train_step = measured
    train_pipa.main(parse_args("train_pipa", flags))


def _measure_openrlhf(flags: list[str], peaks: list[int]) -> None:
    from upstream_dpo import run_upstream

    from pipa_openrlhf.distributed.upstream import DeepspeedStrategy

    # isort: split
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    memory = PeakMemory()
    forward, update = DPOTrainer.concatenated_forward, DeepspeedStrategy.optimizer_step

    def measured_forward(self, *args):
        if torch.is_grad_enabled():  # the policy's pass, which begins a step
            memory.reset()
        return forward(self, *args)

    def measured_update(self, *args, **kwargs):
        update(self, *args, **kwargs)
        peaks.append(memory.peak())

    DPOTrainer.concatenated_forward, DeepspeedStrategy.optimizer_step = measured_forward, measured_update
    run_upstream(flags, os.devnull)


if __name__ == "__main__":
    arm, result_path, *run_flags = sys.argv[1:]
    measured_peaks: list[int] = []
    {"ours": _measure_ours, "openrlhf": _measure_openrlhf}[arm](run_flags, measured_peaks)
    Path(result_path).write_text(json.dumps(measured_peaks))
