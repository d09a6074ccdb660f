"""Load tokenizers and causal language models from a hub name, a folder, or an adapter folder.

An adapter is merged into its base without changing what the two compute together.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pickle import UnpicklingError  # what weights_only raises; nothing is unpickled here
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
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
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from pipa_openrlhf.distributed.strategy import on_cpu
from pipa_openrlhf.distributed.upstream import patch_zero3_weight_mapping
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.remembered import hub_answers

log = logging.getLogger(__name__)

# Whether a kernel is there, and the package that it comes with.
_FLASH_PACKAGES = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4"),
}

_PROBE_TOKENS = 8
# Share of the logits' spread by which merging may change them unseen, and how many times what rounding explains.
_MERGE_CHANGE = 1e-3
_MERGE_TOLERANCE = 3.0
_COARSE_MERGE_CHANGE = 0.2  # such a share where that cannot be measured: quantised weights are quantised again


def use_modelscope() -> None:
    """Download models from ModelScope instead, as OpenRLHF's ``--use_ms`` does."""
    from modelscope.utils.hf_util import patch_hub

    patch_hub()


def only_from_disk(path: str) -> bool:
    """True for a name that must come from the local cache, because the hub cannot be reached."""
    return not os.path.isdir(path) and "modelscope" not in sys.modules and not hub_answers()


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


def is_adapter(path: str) -> bool:
    """True for a folder that holds a PEFT adapter rather than a model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def adapter_base(path: str) -> tuple[str, str | None]:
    """Name or folder of the model that the adapter in ``path`` belongs to, and its revision on the hub.

    A relative folder may be beside the adapter. A folder has no revision.

    Raises:
        UserError: the adapter names no model.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}/adapter_config.json is not a config of an adapter: {first_line(error)}") from error
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base_model_name_or_path: add it, or merge the adapter")
    beside = os.path.join(path, base)
    if not os.path.isdir(base) and os.path.isdir(beside):
        base = beside
    return base, None if os.path.isdir(base) else config.revision


def vllm_rank(rank: int) -> int | None:
    """What vLLM is to be told as ``max_lora_rank`` for an adapter of this rank; None for one of a higher rank."""
    return next((one for one in (1, 8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), None)


def root_model(path: str) -> tuple[str, str | None]:
    """The model below all adapters and its revision: ``path`` itself where it holds none."""
    revision = None
    while is_adapter(path):
        path, revision = adapter_base(path)
    return path, revision


def _vocabulary(lm: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    return cast(nn.Embedding, lm.get_input_embeddings()).weight.shape[0]


def base_model(model: PeftModel) -> PreTrainedModel:
    """The language model in PEFT's wrapper; PEFT would wrap any module."""
    return cast(PreTrainedModel, model.get_base_model())


def adapter_vocabulary(path: str, base: PreTrainedModel) -> int | None:
    """Rows of the embeddings or output head that the adapter in ``path`` brings; None where it brings neither.

    Args:
        base: the adapter's base, with or without weights.
    """
    file = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(file):
        return None
    names = {id(module): name for name, module in base.named_modules()}
    wanted = []
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None:
            prefix = f"base_model.model.{names[id(module)]}"
            wanted += [(f"{prefix}.weight", 0), (f"{prefix}.lora_embedding_A", 1)]
    with safe_open(file, framework="pt") as tensors:
        kept = set(tensors.keys())
        return next((tensors.get_slice(key).get_shape()[axis] for key, axis in wanted if key in kept), None)


def merge_adapter(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """``base`` with the adapter in ``path`` merged, trainable where ``base`` was.

    Raises:
        UserError: merging would give another model.
    """
    frozen = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    rows = adapter_vocabulary(path, base)
    if rows is not None and rows != _vocabulary(base):
        base.resize_token_embeddings(rows, mean_resizing=False)
    merged = merge(PeftModel.from_pretrained(base, path), path)
    for name, parameter in merged.named_parameters():
        # PEFT freezes the base, and merging leaves it frozen.
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    return merged


@torch.no_grad()
def merge(model: PeftModel, what: str) -> PreTrainedModel:
    """The base with its adapter merged, checked on the log-probs of a few tokens; ``what`` names it in an error.

    Raises:
        UserError: the merged model is another one.
    """
    base = base_model(model)
    before = _probe(base)
    _untie_adapted_embeddings(base)
    merged = model.merge_and_unload()
    if before is None:
        return merged
    after = _probe(merged)
    if after is None:
        raise UserError(f"{what}: the model does not run with the adapter merged: give a merged model")
    change = _share_of_spread(after - before, before)
    if change <= _MERGE_CHANGE:
        return merged
    with rounded_otherwise(merged, seed=0):
        rounded = _probe(merged)
    allowed = torch.tensor(_COARSE_MERGE_CHANGE)
    if rounded is not None and all(one.is_floating_point() for one in merged.parameters()):
        allowed = _MERGE_TOLERANCE * _share_of_spread(rounded - after, before)
    if not change <= allowed:
        raise UserError(
            f"{what}: merging the adapter changes log-probs by up to {(after - before).abs().max():.3g}, "
            f"{change / allowed:.2g} times what rounding explains: merge it with the PEFT that trained it, "
            "and give the merged model"
        )
    return merged


def _share_of_spread(change: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Of most tokens' ``log_probs`` [_PROBE_TOKENS, V]; one token, often the first, may turn over by a rounding."""
    spread = (log_probs - log_probs.mean(-1, keepdim=True)).norm(dim=-1)
    return (change.norm(dim=-1) / spread).median()


@contextmanager
def rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within, every layer's output is changed by up to one rounding of its data type."""
    generator_on = cache(lambda device: torch.Generator(device).manual_seed(seed))

    def change(value):
        if isinstance(value, tuple):
            return tuple(map(change, value))
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        generator = generator_on(wide.device)
        relative = torch.rand(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator) * 2 - 1
        return (wide * (1 + torch.finfo(value.dtype).eps * relative)).to(value.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(lambda _module, _inputs, output: change(output)) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _untie_adapted_embeddings(lm: PreTrainedModel) -> None:
    """Give the output head weights of its own where an adapter on one side of a tied pair would change the other."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is None or not any(isinstance(one, BaseTunerLayer) for one in (embedding, head)):
        return
    if head.weight is embedding.weight:
        plain = cast(nn.Linear, head.get_base_layer() if isinstance(head, BaseTunerLayer) else head)
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False


def _probe(lm: PreTrainedModel) -> torch.Tensor | None:
    """[_PROBE_TOKENS, V] float32 log-probs after tokens spread over the vocabulary.

    None for a model that cannot run where its weights are, such as one whose kernels need the accelerator.
    """
    rows = _vocabulary(lm)
    tokens = torch.linspace(0, rows - 1, _PROBE_TOKENS, device=lm.device).long()[None]
    used, training = lm.config._attn_implementation, lm.training
    has_kernels = used not in ("eager", "sdpa")
    try:
        if has_kernels:
            lm.set_attn_implementation("eager")
        logits = lm.eval()(input_ids=tokens, use_cache=False).logits[0]
    except (RuntimeError, ImportError, NotImplementedError, ValueError):
        return None
    finally:
        if has_kernels:
            lm.set_attn_implementation(used)
        lm.train(training)
    return torch.log_softmax(logits.float(), -1)
