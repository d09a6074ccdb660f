"""Tiny random models of any causal-LM class of the installed transformers, shrunk by the names of their settings."""

import inspect
import re

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

VOCAB = 97
# The first pattern that a setting's name matches decides its value.
_VALUES: list[tuple[str, int]] = [
    (r"vocab_size", VOCAB),
    (r"(^|_)(n_layers?|num_layers|num_blocks|num_hidden_layers|num_decoder_layers|encoder_layers|decoder_layers)$", 4),
    (r"(num_nextn_predict|mtp.*layers|num_kv_shared_layers)", 0),
    (r"(first_k_dense_replace|num_dense_layers|num_codebooks|n_langs)", 1),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"(sliding_window|attention_window|window_size|attention_chunk_size|block_size|local_attn)", 4),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx)$", 512),
    (r"(num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|moe_k|num_selected)$", 2),
    (r"(n_shared_experts|num_shared_experts|shared_experts)$", 1),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"(n_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups|ssm_n_groups)$", 1),
    (r"^(q_lora_rank|kv_lora_rank|lora_rank)$", 8),
    (r"qk_head_dim$", 16),
    (r"(rotary_dim)$", 4),
    (r"(head_dim|d_head|d_kv|head_size|kv_channels|mamba_headdim|mamba_head_dim)$", 8),
    (r"(num_key_value_heads|num_kv_heads|num_global_key_value_heads)$", 2),
    (r"mamba_(n|num)_heads$", 8),
    (r"(num_.*heads|n_heads?|num_heads|attention_heads)$", 4),
    (r"(d_state|state_size|mamba_d_state|ssm_state_size)$", 8),
    (r"(chunk_size|mamba_chunk_size)$", 8),
    (r"(intermediate_size|ffn_dim|n_inner|d_ff|dff|ffn_hidden_size|dim_ff|ffn_size|mlp_dim)$", 48),
    (r"mamba_d_ssm$", 64),
    (
        r"^(hidden_size|d_model|n_embd|embed_dim|emb_dim|dim|embedding_size|hidden_dim|lru_width|word_embed_proj_dim)$",
        32,
    ),
    (r"(_embed_dim|_embedding_size|hidden_size_per_layer_input)$", 16),
]
# Attributes that make a model a causal decoder where its class can be something else too, and special tokens.
_FIXED = {
    "is_decoder": True,
    "is_encoder_decoder": False,
    "default_language": "en_XX",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Where sizes alone make no model, or not one with all its kinds of layers.
_HYBRID = ["linear_attention", "full_attention"] * 2
_OF_TYPE = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xlstm": {"hidden_size": 128},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def shrunk_model(model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A float32 model of ``model_class`` with a few thousand weights, large enough to matter, that has run once.

    Raises:
        Exception: whatever its code says to the small config.
    """
    try:
        return _built(model_class, seed, fill_unset=False)
    except Exception as first:
        try:
            return _built(model_class, seed, fill_unset=True)
        except Exception:
            raise first from None


def _built(model_class: type[PreTrainedModel], seed: int, fill_unset: bool) -> PreTrainedModel:
    config = shrink(model_class.config_class, fill_unset)
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        assert model(input_ids=torch.arange(3, 15)[None]).logits.isfinite().all()
    return model


def shrink(config_class: type[PretrainedConfig], fill_unset: bool = False) -> PretrainedConfig:
    """A small config of ``config_class``, nested ones included.

    Args:
        fill_unset: give a value to settings that are unset by default too; some classes then expect one.
    """
    config = config_class()
    changes = {}
    for name in _settings(config):
        small = _FIXED.get(name, _small(name, _value(config, name), fill_unset))
        if small is not None:
            changes[name] = small
    if "kv_lora_rank" in changes:  # latent attention has as many keys as queries
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            changes[name] = shrink(type(part), fill_unset)
    return config_class(**{**changes, **_OF_TYPE.get(config.model_type, {})})


def _small(name: str, value, fill_unset: bool) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | None) or (value is None and not fill_unset):
        return None
    for pattern, small in _VALUES:
        if re.search(pattern, name):
            return small if value is None else min(value, small)
    return None


def _value(config: PretrainedConfig, name: str):
    try:
        return getattr(config, name, None)
    except Exception:  # differs between layers
        return config.to_dict().get(name)


def _settings(config: PretrainedConfig) -> list[str]:
    """Names of the settings that the config's own ``__init__`` takes."""
    names = [name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")]
    return [*names, *(name for name in _FIXED if name not in names and hasattr(config, name))]


def causal_lm_classes() -> list[type[PreTrainedModel]]:
    """Every class behind ``AutoModelForCausalLM``, once."""
    classes = {}
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        for one in entry if isinstance(entry, tuple) else (entry,):
            classes[one.__name__] = one
    return list(classes.values())
