"""Load tokenizers and causal language models from a hub name, a folder, or an adapter folder."""

import os

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from pipa_openrlhf.distributed.devices import on_cpu
from pipa_openrlhf.distributed.upstream import flash_attn_installed, patch_zero3_weight_mapping
from pipa_openrlhf.errors import UserError


def is_adapter(path: str) -> bool:
    """True for a folder that holds a PEFT adapter rather than a model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def adapter_base(path: str) -> str:
    """Name or folder of the model that the adapter in ``path`` belongs to; a relative folder may be beside it."""
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    beside = os.path.join(path, base or "")
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base_model_name_or_path: add it, or merge the adapter")
    return beside if not os.path.isdir(base) and os.path.isdir(beside) else base


def check_model_path(path: str, flag: str) -> None:
    """Refuse a path that cannot be a model, before anything heavy happens.

    Raises:
        UserError: the folder does not exist, or holds neither a model nor an adapter.
    """
    looks_local = os.path.isabs(path) or path.startswith(("./", "../", "~")) or path.count("/") > 1
    if os.path.isdir(path):
        if not is_adapter(path) and not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{flag} {path}: the folder has no config.json and no adapter_config.json")
    elif looks_local or os.path.exists(path):
        raise UserError(f"{flag} {path}: no such folder")


def resolve_attention(name: str, say=print) -> str:
    """The attention implementation to use: flash attention falls back to sdpa where flash-attn is absent."""
    if "flash" in name and (on_cpu() or not flash_attn_installed()):
        say(f"{name} is not available on this machine: using sdpa attention")
        return "sdpa"
    return name


def load_tokenizer(
    path: str, use_fast: bool = True, trust_remote_code: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model or adapter folder; padding falls back to the end-of-sequence token.

    Raises:
        UserError: there is none at ``path``, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=use_fast, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if is_adapter(path):
            return load_tokenizer(adapter_base(path), use_fast, trust_remote_code, padding_side)
        raise UserError(f"cannot load a tokenizer from {path}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no eos token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side
    return tokenizer


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool = False,
    experts_implementation: str | None = None,
    load_in_4bit: bool = False,
    use_liger_kernel: bool = False,
    ds_config: dict | None = None,
) -> PreTrainedModel:
    """A causal language model with all adapters merged.

    Args:
        path: hub name, folder, or adapter folder (merged into its base, itself possibly an adapter folder).
        ds_config: a DeepSpeed config; with ZeRO-3 the weights are partitioned while they load.

    Raises:
        UserError: there is no model at ``path``.
    """
    if is_adapter(path):
        # Merging needs whole weights, so the base is loaded unpartitioned even under ZeRO-3.
        base = load_causal_lm(
            adapter_base(path), dtype, attn_implementation, trust_remote_code, experts_implementation
        )
        try:
            return PeftModel.from_pretrained(base, path).merge_and_unload()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot load the adapter {path}: {_first_line(error)}") from error

    model_class = AutoModelForCausalLM
    options = {}
    if use_liger_kernel:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as model_class
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    # transformers partitions the weights at load while such an object is alive, and only then.
    zero3 = None
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        patch_zero3_weight_mapping()
        zero3 = HfDeepSpeedConfig(ds_config)
    try:
        model = model_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {path}: {_first_line(error)}") from error
    finally:
        del zero3
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
