"""A model to a folder as transformers writes it, with the configs that it was read with."""

import json
import os
import shutil
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from pipa_openrlhf.model.adapters import root_model
from pipa_openrlhf.model.loading import only_from_disk

_CONFIG, _GENERATION = "config.json", "generation_config.json"
# What merging an adapter may have changed.
_MAY_CHANGE = ("vocab_size", "tie_word_embeddings")


def save_model(
    model: PreTrainedModel, folder: str, state: dict[str, torch.Tensor] | None = None, *, read_from: str
) -> None:
    """Write ``model`` to ``folder``.

    Args:
        state: its weights, where they are not in ``model`` itself.
        read_from: the hub name, model folder or adapter folder that it was loaded from.
    """
    generation: Any = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = generation
    written = os.path.join(folder, _GENERATION)
    original = _original(read_from, _GENERATION)
    if original is not None:
        shutil.copyfile(original, written)
    elif os.path.isfile(written):
        os.remove(written)  # without one, generation reads the model's config
    original = _original(read_from, _CONFIG)
    if original is not None and not model.is_remote_code():
        _restore_config(model, os.path.join(folder, _CONFIG), original)


def _original(path: str, name: str) -> str | None:
    """The file ``name`` of the model below all adapters in ``path``; None where it has none."""
    root, revision = root_model(path)
    return cached_file(
        root,
        name,
        revision=revision,
        local_files_only=only_from_disk(root),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _restore_config(model: PreTrainedModel, path: str, original: str) -> None:
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    with open(original, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("model_type") != written["model_type"]:
        return  # the language model of a larger one was loaded and saved alone
    config["architectures"] = written["architectures"]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = written["dtype"]
    if "quantization_config" not in written:
        config.pop("quantization_config", None)
    read = type(model.config).from_dict(config)
    sections = [(config, model.config, read)]
    if isinstance(config.get("text_config"), dict):
        sections.append((config["text_config"], model.config.get_text_config(), read.get_text_config()))
    for section, now, then in sections:
        for name in _MAY_CHANGE:
            if getattr(now, name, None) != getattr(then, name, None):
                section[name] = getattr(now, name)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
