"""Load tokenizers and causal language models from a hub name, a folder, or an adapter folder."""

import logging
import os
import sys
from pickle import UnpicklingError  # what weights_only raises; nothing is unpickled here
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.integrations.hub_kernels import is_kernel
from transformers.utils import find_adapter_config_file
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from pipa_openrlhf.distributed.strategy import on_cpu
from pipa_openrlhf.distributed.upstream import patch_zero3_weight_mapping
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import adapter_base, is_adapter, merge_adapter, root_model
from pipa_openrlhf.remembered import hub_answers

log = logging.getLogger(__name__)

# Whether a kernel is there, and the package that it comes with.
_FLASH_PACKAGES = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4"),
}


def use_modelscope() -> None:
    """Download models from ModelScope instead, as OpenRLHF's ``--use_ms`` does."""
    from modelscope.utils.hf_util import patch_hub

    patch_hub()


def only_from_disk(path: str) -> bool:
    """True for a name that must come from the local cache, because the hub cannot be reached."""
    return not os.path.isdir(path) and "modelscope" not in sys.modules and not hub_answers()


def refuse_hub_adapter(path: str, revision: str | None = None) -> None:
    """transformers would put an adapter of the hub on its base without merging it.

    Raises:
        UserError: the hub has an adapter of the name ``path``; adapters are read from folders.
    """
    if os.path.isdir(path) or "modelscope" in sys.modules:
        return
    try:
        found = find_adapter_config_file(path, revision=revision, local_files_only=only_from_disk(path))
    except OSError:  # no name that the hub knows: whoever loads it says so
        return
    if found is not None:
        raise UserError(
            f"{path} on the hub is an adapter: download it, `hf download {path} --local-dir FOLDER`, and give it"
        )


def resolve_attention(name: str, param_dtype: str) -> str:
    """The attention kernel to use: ``sdpa`` where ``name`` is one that cannot run here, with a line that says why.

    Args:
        name: as ``--ds.attn_implementation`` gives it; every kernel is judged by its own package.
        param_dtype: ``fp32``, ``fp16`` or ``bf16``.
    """
    if is_kernel(name):
        missing = None if is_kernels_available() else "the kernels package"
    elif name in _FLASH_PACKAGES:
        found, missing = _FLASH_PACKAGES[name]
        # transformers takes the kernel from the hub where the package is absent.
        missing = None if found() or is_kernels_available() else missing
    else:
        return name
    if on_cpu():
        reason = "it needs a GPU"
    elif missing is not None:
        reason = f"{missing} is not installed"
    elif param_dtype == "fp32" and "flash" in name:
        reason = "it has no fp32; --ds.param_dtype bf16 or fp16 would use it"
    else:
        return name
    log.info(f"{name} is not available: {reason}; using sdpa attention")
    return "sdpa"


def load_tokenizer(
    path: str,
    use_fast: bool = True,
    trust_remote_code: bool = False,
    padding_side: str = "right",
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model or adapter folder; padding falls back to the end-of-sequence token.

    Raises:
        UserError: there is none at ``path``, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            use_fast=use_fast,
            trust_remote_code=trust_remote_code,
            local_files_only=only_from_disk(path),
        )
    except (OSError, ValueError, KeyError) as error:
        if is_adapter(path):
            base, base_revision = adapter_base(path)
            return load_tokenizer(base, use_fast, trust_remote_code, padding_side, base_revision)
        refuse_hub_adapter(path, revision)
        raise UserError(f"cannot load a tokenizer from {path}: {first_line(error)}") from error
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
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal language model with all adapters merged.

    Args:
        path: hub name, folder, or adapter folder (merged into its base, itself possibly an adapter folder).
        ds_config: a DeepSpeed config; with ZeRO-3 the weights are partitioned while they load.
        revision: of a model of the hub; None: its newest.

    Raises:
        UserError: there is no model at ``path``, or its adapter does not fit.
    """
    refuse_hub_adapter(path, revision)
    if is_adapter(path):
        # Merging needs whole weights, so the base is loaded unpartitioned even under ZeRO-3.
        base_path, base_revision = adapter_base(path)
        base = load_causal_lm(
            base_path,
            dtype,
            attn_implementation,
            trust_remote_code,
            experts_implementation,
            revision=base_revision,
        )
        try:
            return merge_adapter(base, path)
        except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise UserError(f"cannot load the adapter {path}: {_reason(error)}") from error

    model_class: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if use_liger_kernel:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        model_class = AutoLigerKernelForCausalLM
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
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=only_from_disk(path),
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"cannot load a model from {path}: {first_line(error)}") from error
    finally:
        del zero3
    return model


def empty_causal_lm(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at ``path``, below all adapters, without its weights."""
    root, revision = root_model(path)
    config = AutoConfig.from_pretrained(
        root, revision=revision, trust_remote_code=trust_remote_code, local_files_only=only_from_disk(root)
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _reason(error: Exception) -> str:
    """The line that names the sizes where a tensor's differ, else the first."""
    lines = [line.strip() for line in str(error).split("\n")]
    return next((line for line in lines if line.startswith("size mismatch")), first_line(error))
