"""The value head g: will the next token be right? (paper, sections 2.5 and 3.1)"""

import json
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipa_openrlhf.errors import UserError, first_line

WEIGHTS_FILE = "value_head.safetensors"
CONFIG_FILE = "value_head_config.json"


class ValueHead(nn.Module):
    """Linear(d, h) -> ReLU -> Linear(h, 1). Its sigmoid is g = p(c_t = 1 | x, y_<t).

    The last layer starts at zero, so that g = 0.5 everywhere at step 0 (Figure 3).
    """

    def __init__(self, input_size: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.dense = nn.Linear(input_size, hidden_size, dtype=dtype)
        self.out = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] hidden states that predict y_t -> [...] logits u_t, float32 or wider."""
        u = self.out(torch.relu(self.dense(hidden))).squeeze(-1)
        return u.to(torch.promote_types(u.dtype, torch.float32))


def save_value_head(folder: str, state: dict[str, torch.Tensor]) -> None:
    """Write ``dense.weight``, ``dense.bias``, ``out.weight``, ``out.bias`` and the head's config to ``folder``."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, os.path.join(folder, WEIGHTS_FILE))
    hidden_size, input_size = state["dense.weight"].shape
    config = {"input_size": input_size, "hidden_size": hidden_size, "activation": "relu"}
    with open(os.path.join(folder, CONFIG_FILE), "w") as file:
        json.dump(config, file, indent=2)


def load_value_head(folder: str, dtype: torch.dtype) -> ValueHead:
    """The value head exported to ``folder``.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    weights, config = (os.path.join(folder, name) for name in (WEIGHTS_FILE, CONFIG_FILE))
    for path in (weights, config):
        if not os.path.isfile(path):
            raise UserError(f"no value head in {folder}: {path} does not exist")
    try:
        with open(config) as file:
            sizes = json.load(file)
        head = ValueHead(sizes["input_size"], sizes["hidden_size"], dtype)
        head.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{weights} with {CONFIG_FILE} is not a value head of this package: {first_line(error)}"
        ) from error
    return head
