"""What a DeepSpeed engine trains, in pieces that know neither its ZeRO stage nor its number of ranks.

A piece is a part of one flattened parameter: its float32 master weights and both Adam moments. A rank reads what is
its own and writes what it needs; nothing of 12 bytes a parameter is ever gathered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from pipa_openrlhf.training.checks import full_masters

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
# What DeepSpeed's dynamic loss scale of float16 depends on; ZeRO-0 keeps it elsewhere and without hysteresis.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# (kind, start, stop) -> float32 [stop - start] on CPU, of one flattened parameter
ReadPiece = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """``tensors`` by kind, each float32 [stop - start] on CPU, of a flattened parameter from ``start`` on."""

    start: int
    tensors: dict[str, torch.Tensor]


class EngineState:
    """Reads and writes a DeepSpeed engine's trainable state one parameter at a time."""

    def __init__(self, engine):
        self.engine = engine
        optimizer = engine.optimizer
        self._base_optimizer = getattr(optimizer, "optimizer", optimizer)
        self._masters: dict[int, torch.Tensor] = {}
        if engine.zero_optimization_stage() == 0:
            own = {id(parameter): parameter for parameter in engine.module.parameters()}
            self._masters = full_masters(engine) or own
        elif engine.zero_optimization_stage() in (1, 2):
            # DeepSpeed links the moments after the first group's first update, when other groups have none yet.
            for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups):
                lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trainable parameters by name."""
        return [(name, one) for name, one in self.engine.module.named_parameters() if one.requires_grad]

    def read(self, parameter: torch.nn.Parameter) -> Piece:
        """This rank's piece, which may be empty; those of all ranks are the whole parameter, each part once."""
        start, tensors = self._held(parameter)
        if self._masters:  # every rank holds all of it
            length = tensors[MASTER].numel()
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            start, stop = (length * one // world_size for one in (rank, rank + 1))
            tensors = {kind: tensor[start:stop] for kind, tensor in tensors.items()}
        return Piece(start, {kind: tensor.detach().float().cpu().clone() for kind, tensor in tensors.items()})

    def write(self, parameter: torch.nn.Parameter, read_piece: ReadPiece) -> None:
        """Set what this rank holds, and the weight that forward passes use with it. A collective call."""
        start, tensors = self._held(parameter)
        if hasattr(parameter, "ds_id"):
            self._write_partition(parameter, start, tensors[MASTER].numel(), read_piece)
        else:
            for kind, tensor in tensors.items():
                tensor.copy_(read_piece(kind, start, start + tensor.numel()))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            if torch.distributed.get_rank() == 0 or not hasattr(parameter, "ds_id"):
                parameter.data.copy_(read_piece(MASTER, 0, parameter.numel()).view(parameter.shape))

    def _held(self, parameter: Any) -> tuple[int, dict[str, torch.Tensor]]:
        """Where this rank's part of the flattened parameter starts, and its tensors; of ZeRO-3 they are copies."""
        if self._masters:
            master = self._masters[id(parameter)]
            state = self._base_optimizer.state[master]
            return 0, {MASTER: master.data.view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}
        if hasattr(parameter, "ds_id"):
            size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
            start = min(whole, torch.distributed.get_rank() * size)
            held = min(size, whole - start)  # the last ranks' parts are padded
            tensors = {MASTER: safe_get_local_fp32_param(parameter)}
            tensors.update({kind: safe_get_local_optimizer_state(parameter, kind) for kind in MOMENTS})
            return start, {kind: tensor.view(-1)[:held] for kind, tensor in tensors.items()}
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, {kind: torch.empty(0) for kind in KINDS}
        tensors = {kind: mapping.get_hp_fragment(None if kind == MASTER else kind) for kind in KINDS}
        return mapping.lp_fragment_address.start, {kind: tensor.data for kind, tensor in tensors.items()}

    def _write_partition(self, parameter: Any, start: int, held: int, read_piece: ReadPiece) -> None:
        for kind in KINDS:
            value = torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
            value[:held] = read_piece(kind, start, start + held)
            if kind == MASTER:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, kind)

    @property
    def updates(self) -> int:
        """Adam's own count of updates, which its bias correction uses."""
        counters = [state["step"] for state in self._base_optimizer.state.values() if "step" in state]
        counters += [group["step"] for group in self._base_optimizer.param_groups if "step" in group]
        return int(max(counters, default=0))

    @updates.setter
    def updates(self, count: int) -> None:
        for state in list(self._base_optimizer.state.values()) + self._base_optimizer.param_groups:
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(count)
            elif "step" in state:
                state["step"] = count

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of float16's loss scale; of no effect with other data types."""
        scaler = self._loss_scaler()
        return {name: getattr(scaler, name) for name in _LOSS_SCALE if getattr(scaler, name, None) is not None}

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float]) -> None:
        scaler = self._loss_scaler()
        for name, value in state.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

    def _loss_scaler(self):
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
