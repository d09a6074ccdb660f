"""The value model in the layout of Qwen2.5-Math-RM, ``Qwen2ForRewardModel``, which vLLM serves as it is.

There every token has a score, Linear(d, d), ReLU, Linear(d, 1) of its last hidden state: our value head, under other
names. Score i is read after token i and judges token i + 1. It is the logit u, not g.
"""

import json
import os
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import load_value_head
from pipa_openrlhf.training.save_model import save_model
from pipa_openrlhf.training.sharded_weights import WholeModel, save_sharded

VALUE_MODEL = "value_model"
_FLAG = "--ckpt.value_model"
_MODEL_TYPE, _ARCHITECTURE = "qwen2", "Qwen2ForRewardModel"
_OUTPUT_HEAD = "lm_head."


def check_reward_model(config: RunConfig, model: PreTrainedConfig) -> None:
    """Refuse a run whose value model has no such layout.

    Args:
        model: of the run's model, below all adapters.

    Raises:
        UserError: nothing learns a value, the model is of another family, or the value head is wider than the model.
    """
    objective = config.objective.make_objective(config)
    if not objective.learns_value:
        raise UserError(f"{_FLAG} needs a value head, and {objective.name} trains none here: leave it out")
    if model.model_type != _MODEL_TYPE:
        raise UserError(
            f"{_FLAG} needs a model of type {_MODEL_TYPE} (Qwen2, Qwen2.5), and {config.model.path} is "
            f"{model.model_type}: leave it out; the value head is exported all the same"
        )
    size, init_from = model.hidden_size, config.value.init_from
    width = config.value.hidden_size or size
    if init_from:
        width = load_value_head(init_from, torch.float32).dense.out_features
    if width > size:
        source = f"--value.init_from {init_from}" if init_from else "--value.hidden_size"
        raise UserError(
            f"{_FLAG} has room for a value head of the model's hidden size {size}, and that of {source} has {width}: "
            "leave one of them out"
        )


def reward_model_bytes(model: PreTrainedModel) -> int:
    """What the value model of a language model takes on disk, at most.

    Args:
        model: with or without weights.
    """
    size = model.config.hidden_size
    head = 4 * (size * size + size + size + 1)
    return head + sum(
        one.numel() * one.element_size() for name, one in model.named_parameters() if not name.startswith(_OUTPUT_HEAD)
    )


def save_reward_model(
    folder: str,
    whole: WholeModel,
    head: dict[str, torch.Tensor],
    read_from: str,
    tokenizer: PreTrainedTokenizerBase,
    strategy: Strategy,
) -> None:
    """Write the model without its output head, and the value head in its place. Collective.

    Args:
        head: weights of the value head on rank 0, empty elsewhere.
        read_from: what the model was loaded from, see :func:`save_model`.
    """

    def weights() -> Iterator[tuple[str, torch.Tensor | None]]:
        yield from ((name, one) for name, one in whole.weights() if not name.startswith(_OUTPUT_HEAD))
        if head:
            yield from score_weights(head).items()

    if strategy.is_rank_0():
        os.makedirs(folder, exist_ok=True)
    save_sharded(
        folder, whole.model, weights(), lambda part, some: save_model(whole.model, part, some, read_from=read_from)
    )
    if strategy.is_rank_0():
        _name_architecture(folder)
        tokenizer.save_pretrained(folder)


def score_weights(head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The value head as ``score``, float32; neurons that a narrower one lacks are zero.

    Args:
        head: ``dense.weight`` [h, d], ``dense.bias`` [h], ``out.weight`` [1, h], ``out.bias`` [1]; h at most d.
    """
    width, size = head["dense.weight"].shape
    weights = {name: tensor.float() for name, tensor in head.items()}
    dense_weight, dense_bias, out_weight = torch.zeros(size, size), torch.zeros(size), torch.zeros(1, size)
    dense_weight[:width], dense_bias[:width] = weights["dense.weight"], weights["dense.bias"]
    out_weight[:, :width] = weights["out.weight"]
    return {
        "score.0.weight": dense_weight,
        "score.0.bias": dense_bias,
        "score.2.weight": out_weight,
        "score.2.bias": weights["out.bias"],
    }


def _name_architecture(folder: str) -> None:
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config |= {"architectures": [_ARCHITECTURE], "num_labels": 1}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    generation = os.path.join(folder, "generation_config.json")
    if os.path.isfile(generation):
        os.remove(generation)  # nothing is generated
