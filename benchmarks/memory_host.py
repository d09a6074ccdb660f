"""Host memory of checkpoints and exports: measured with a small model, and estimated for full fine-tuning at 70B.

    python benchmarks/memory_host.py

The estimates come from the shapes of a model's parameters and the sizes of files that the package writes. Not in it:
what loading takes, the accelerator's context, and pages of files that the system keeps while it has room.
"""

import argparse
import ctypes
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import torch
from inputs import as_text, character_tokenizer
from measure import GIB, PeakMemory, print_head, print_table
from transformers import AutoModelForCausalLM, LlamaConfig

import pipa_openrlhf
from pipa_openrlhf.config import CheckpointConfig, DataConfig, DeepSpeedConfig, ModelConfig, RunConfig, TrainConfig
from pipa_openrlhf.objectives.sft import SftConfig
from pipa_openrlhf.training import checkpoint, sharded_weights
from pipa_openrlhf.training.trainer import Callback

MEBIBYTE = 1 << 20
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
SMALL = LlamaConfig(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=10240,
    tie_word_embeddings=False,
)
RANKS, RANKS_A_NODE = 64, 8
# What the package has in memory before it writes a file, and what stands for it with the small model.
FILE_BYTES, SHARD_BYTES = checkpoint.FILE_BYTES, sharded_weights.SHARD_BYTES
SMALL_FILES = 16 * MEBIBYTE
MOST = 1.5  # measured to estimated: the small model pays for what does not grow, too


def shapes_of(config: LlamaConfig) -> list[tuple[str, int]]:
    """Names and numbers of elements of a model's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(name, one.numel()) for name, one in model.named_parameters()]


def checkpoint_bytes(shapes: list[tuple[str, int]], ranks: int, file_bytes: int) -> int:
    """Most that a rank holds while it writes a checkpoint: its pieces up to a file's size, as tensors and as bytes."""
    waiting = most = 0
    for _, size in shapes:
        waiting += math.ceil(size / ranks) * 3 * 4  # master and two moments
        most = max(most, waiting)
        waiting = 0 if waiting >= file_bytes else waiting
    return 2 * most


def export_bytes(shapes: list[tuple[str, int]], itemsize: int, shard_bytes: int) -> int:
    """Most that rank 0 holds while it exports: a shard as tensors and as bytes, a layer, and the next parameter."""
    waiting = most = of_layer = 0
    layer = None
    for name, size in [*shapes, ("", 0)]:
        found = re.match(r".*?\.\d+\.", name)
        if found is None or found[0] != layer:
            if waiting + of_layer > shard_bytes:
                most, waiting = max(most, 2 * waiting + of_layer + size * itemsize), 0
            waiting, of_layer = waiting + of_layer, 0
        layer, of_layer = found[0] if found else None, of_layer + size * itemsize
    return max(most, 2 * waiting)


def resume_bytes(shapes: list[tuple[str, int]]) -> int:
    """Most that a rank holds while it reads a checkpoint: the float32 master of the largest parameter."""
    return max(size for _, size in shapes) * 4


class Measured(Callback):
    """Peaks above what the run holds anyway, in the last step of a run."""

    def __init__(self):
        self.peaks: dict[str, int] = {}

    def on_step_end(self, trainer, row) -> None:
        if trainer.position.step == trainer.total_steps:
            self._measure("checkpoint", trainer.save_checkpoint)
            self._measure("export", lambda: trainer.export_to(trainer.config.ckpt.output_dir))

    def _measure(self, name: str, work) -> None:
        work()  # what it imports and caches stays
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again
        memory = PeakMemory()
        memory.reset()
        work()
        self.peaks[name] = memory.peak()


def measure(work: Path) -> dict[str, int]:
    """Peak bytes by what was done, of one rank that trains ``SMALL`` in float32."""
    checkpoint.FILE_BYTES = sharded_weights.SHARD_BYTES = SMALL_FILES
    tokenizer = character_tokenizer()
    AutoModelForCausalLM.from_config(SMALL).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    row = {"prompt": as_text([1, 2, 1, 3]), "completion": as_text([4]), "label": True}
    (work / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(work / "model")),
        data=DataConfig(dataset=str(work / "data.jsonl"), cache_dir=str(work / "prepared")),
        ds=DeepSpeedConfig(param_dtype="fp32", zero_stage=0),
        train=TrainConfig(batch_size=2),
        ckpt=CheckpointConfig(output_dir=str(work / "out")),
        objective=SftConfig(),
    )
    measured = Measured()
    pipa_openrlhf.train(config, [measured])
    return measured.peaks


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print_head()
    small = shapes_of(SMALL)
    estimates = {
        "checkpoint": checkpoint_bytes(small, 1, SMALL_FILES),
        "export": export_bytes(small, 4, SMALL_FILES),
    }
    with tempfile.TemporaryDirectory() as folder:
        peaks = measure(Path(folder))
    count = sum(size for _, size in small)
    rows = [[name, *(f"{one / MEBIBYTE:.0f}" for one in (estimates[name], peaks[name]))] for name in peaks]
    print(f"\n{count / 1e6:.0f} million parameters, files of {SMALL_FILES // MEBIBYTE} MiB, one rank, MiB")
    print_table(["", "estimated", "measured"], rows)
    large = shapes_of(LLAMA_70B)
    count = sum(size for _, size in large)
    written, exported = checkpoint_bytes(large, RANKS, FILE_BYTES), export_bytes(large, 2, SHARD_BYTES)
    table = [
        ["checkpoint", f"{written / GIB:.1f}", f"{RANKS_A_NODE * written / GIB:.0f}"],
        ["resume", f"{resume_bytes(large) / GIB:.1f}", f"{RANKS_A_NODE * resume_bytes(large) / GIB:.0f}"],
        ["export, on the first", f"{exported / GIB:.1f}", f"{exported / GIB:.0f}"],
        ["12 bytes a parameter, gathered", f"{12 * count / GIB:.0f}", ""],
    ]
    print(f"\n{count / 1e9:.0f} billion parameters, {RANKS} ranks, {RANKS_A_NODE} a node, bf16, estimated, GiB")
    print_table(["", "a rank", "a node"], table)
    worst = max(peaks[name] / estimates[name] for name in peaks)
    print(f"\nmeasured is at most {worst:.2f} times estimated; more than {MOST} is an error")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
