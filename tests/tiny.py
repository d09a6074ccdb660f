"""Tiny models, tokenizers and data made on the spot, and a way to run the real command lines."""

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipa_openrlhf.cli import entry
from pipa_openrlhf.cli.flags import parse

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import Callback

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# What a launcher tells a rank. Training in this process leaves those of its group of one behind.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: one token a byte, and the chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def make_model(seed: int, vocab_size: int = 258, **overrides) -> LlamaForCausalLM:
    """Two-layer Llama with weights large enough that two seeds disagree clearly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "eos_token_id": 257,
            "pad_token_id": 257,
            **overrides,
        }
    )
    return LlamaForCausalLM(config).eval()


def make_qwen(folder, seed: int = 0, **changes) -> str:
    """A folder with a two-layer Qwen2 and a tokenizer; returns its path."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        **{
            **sizes,
            "vocab_size": 258,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "eos_token_id": 257,
            **changes,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(base_folder, folder, seed: int) -> PeftModel:
    """An adapter that changes its base clearly."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """The lines that the package logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("pipa_openrlhf")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def write_jsonl(path, rows: list[dict]) -> str:
    """Write rows and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def start_module(module: str, *flags, ranks: int = 0) -> subprocess.Popen:
    """The real command line: ``python -m`` (ranks=0), or the deepspeed launcher's per-rank environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "-m"]
    return subprocess.Popen(
        [*launcher, f"pipa_openrlhf.cli.{module}", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run_module(module: str, *flags, ranks: int = 0, timeout: int = 300) -> subprocess.CompletedProcess:
    """:func:`start_module` and wait."""
    process = start_module(module, *flags, ranks=ranks)
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_in_process(module: str, *flags, **options) -> int:
    """Exit status of a module run in this process, with its error lines on stderr.

    Args:
        options: of the module's main; the training modules' takes ``callbacks``.
    """
    main = importlib.import_module(f"pipa_openrlhf.cli.{module}").main
    return entry.run(partial(main, **options), module, list(map(str, flags)))


def train(module: str, *flags, callbacks: "Sequence[Callback]" = ()) -> list[dict]:
    """Run a training module's own main in this process, as one rank, and return its metrics rows."""
    config = parse(module, list(map(str, flags)))
    importlib.import_module(f"pipa_openrlhf.cli.{module}").main(config, callbacks)
    return read_jsonl(os.path.join(config.ckpt.output_dir, "metrics.jsonl"))


def flags(values: dict) -> list[str]:
    """Command-line words: True is a bare switch, a list several words, None leaves a flag out."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return words
