"""A model's weights written while they come, one shard of them in memory, in the files that transformers names."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.model.adapters import base_model

SHARD_BYTES = 5_000_000_000
_PARTS = ".export_parts"
_LAYER = re.compile(r".*?\.\d+\.")  # as in model.layers.31.mlp.up_proj.weight

# Writes a model with no weights but these to a folder.
Save = Callable[[str, dict[str, torch.Tensor]], None]


@dataclass(frozen=True)
class WholeModel:
    """A language model with its adapter, if it was trained with one, in its weights.

    Attributes:
        model: has the config, the names of the parameters and the buffers.
        weights: makes the weights by name, once a call, as rank 0 gets them, None elsewhere. Collective.
    """

    model: PreTrainedModel
    weights: Callable[[], Iterable[tuple[str, torch.Tensor | None]]]


def one_by_one(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], strategy: Strategy
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each whole on CPU at rank 0, None elsewhere. Collective."""
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach().cpu().clone() if strategy.is_rank_0() else None
        yield name, whole


@torch.no_grad()
def merged_one_by_one(model: torch.nn.Module, strategy: Strategy) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The same of a frozen model with LoRA layers, each weight with its adapter merged and under its former name."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue  # an adapter's
        owner, _, kind = name.rpartition(".base_layer.")
        layer = layers[owner] if owner and kind == "weight" else None
        adapter = [] if layer is None else [one for one in layer.parameters() if one.requires_grad]
        with deepspeed.zero.GatheredParameters([parameter, *adapter], enabled=hasattr(parameter, "ds_id")):
            whole = None
            if strategy.is_rank_0():
                whole = parameter if layer is None else parameter + layer.get_delta_weight("default")
                whole = whole.detach().cpu().clone()
        yield name.replace(".base_layer.", "."), whole


def has_adapted_embeddings(model: PeftModel) -> bool:
    """Whether an adapter changes the embeddings, and with tied ones the output head."""
    return isinstance(base_model(model).get_input_embeddings(), LoraLayer)


def save_sharded(
    folder: str, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor | None]], save: Save
) -> None:
    """Write ``weights`` as they come, and the buffers that ``model`` keeps. Collective; None comes but on rank 0."""
    shards: ShardedWeights | None = None
    for name, tensor in weights:
        if tensor is None:
            continue
        if shards is None:
            save(folder, {})
            shards = ShardedWeights(folder, save)
        shards.add(name, tensor)
    if shards is None:
        return
    # Not the second name of tied weights.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            shards.add(name, tensor.detach().cpu())
    shards.close()


class ShardedWeights:
    """Weights of a model in ``folder``: ``model.safetensors``, or numbered shards and their index.

    Args:
        save: writes a model with no weights but these to a folder, as one ``model.safetensors``. Names and shapes may
            change on the way, as where a layer's experts are one tensor in memory and many in files; a layer is never
            divided for that.
    """

    def __init__(self, folder: str, save: Save):
        self._folder, self._save = folder, save
        self._parts = os.path.join(folder, _PARTS)
        self._waiting: dict[str, torch.Tensor] = {}
        self._of_layer: dict[str, torch.Tensor] = {}
        self._layer: str | None = None
        self._names: list[list[str]] = []  # of the weights in every part
        self._bytes = 0
        shutil.rmtree(self._parts, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A weight; those of a layer come one after the other."""
        found = _LAYER.match(name)
        layer = found[0] if found else None
        if layer is None or layer != self._layer:
            self._end_layer()
        self._layer = layer
        self._of_layer[name] = tensor
        self._bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left and give the files their names."""
        self._end_layer()
        self._write()
        count = len(self._names)
        names = [SAFE_WEIGHTS_NAME]
        if count > 1:
            stem, ending = SAFE_WEIGHTS_NAME.split(".")
            names = [f"{stem}-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1)]
        for stale in {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & set(os.listdir(self._folder)):
            os.remove(os.path.join(self._folder, stale))
        for number, name in enumerate(names):
            os.replace(self._part(number), os.path.join(self._folder, name))
        if count > 1:
            weight_map = {weight: name for name, weights in zip(names, self._names) for weight in weights}
            with open(os.path.join(self._folder, SAFE_WEIGHTS_INDEX_NAME), "w") as file:
                json.dump({"metadata": {"total_size": self._bytes}, "weight_map": weight_map}, file, indent=2)
        shutil.rmtree(self._parts)

    def _end_layer(self) -> None:
        held = sum(one.nbytes for one in (*self._waiting.values(), *self._of_layer.values()))
        if self._waiting and held > SHARD_BYTES:
            self._write()
        self._waiting.update(self._of_layer)
        self._of_layer = {}

    def _write(self) -> None:
        number = len(self._names)
        folder = os.path.join(self._parts, "model")
        self._save(folder, self._waiting)
        os.rename(os.path.join(folder, SAFE_WEIGHTS_NAME), self._part(number))
        with safe_open(self._part(number), framework="pt") as file:
            self._names.append(list(file.keys()))
        self._waiting = {}

    def _part(self, number: int) -> str:
        return os.path.join(self._parts, f"{number}.safetensors")
