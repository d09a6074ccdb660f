"""Resumable checkpoints: trainable state by parameter name, independent of ZeRO stage and number of ranks.

A checkpoint is a folder ``global_stepN`` with ``trainable.safetensors`` (float32 master weights and Adam moments),
``rng.safetensors`` (generator states of every rank), ``state.json`` (scheduler, position in the data, counters) and
``checksums.json`` (of all of these, written last). It is written to a temporary name and renamed, so a folder is whole
or absent; what happens to it later, on a disk or while it is copied, shows in the checksums.
"""

import json
import logging
import os
import re
import shutil
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipa_openrlhf.distributed.strategy import Strategy, on_cpu
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.prior.cache import file_sha256
from pipa_openrlhf.training.checks import full_masters

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed's dynamic loss scale of float16 depends on; ZeRO-0 keeps it elsewhere and without hysteresis.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_CHECKSUMS = "checksums.json"
_NAME = re.compile(r"global_step(\d+)")


class EngineState:
    """Reads and writes a DeepSpeed engine's trainable state one parameter at a time. Every call is collective."""

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

    def read(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """``master`` and both moments of a parameter, float32 on CPU."""
        if self._masters:
            master = self._masters[id(parameter)]
            tensors = {"master": master.data, **{name: self._base_optimizer.state[master][name] for name in MOMENTS}}
        else:
            tensors = {"master": safe_get_full_fp32_param(parameter)}
            tensors.update({name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS})
        return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}

    def write(self, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        """Set what :meth:`read` returns, and the weight that forward passes use with it."""
        device = get_accelerator().current_device_name()
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        if self._masters:
            master = self._masters[id(parameter)]
            master.data.copy_(tensors["master"])
            for name in MOMENTS:
                self._base_optimizer.state[master][name].copy_(tensors[name])
        elif hasattr(parameter, "ds_id"):
            # DeepSpeed's full-tensor setter fails on sizes that the ranks do not divide.
            safe_set_local_fp32_param(parameter, _partition(tensors["master"], parameter))
            for name in MOMENTS:
                safe_set_local_optimizer_state(parameter, _partition(tensors[name], parameter), name)
        else:
            safe_set_full_fp32_param(parameter, tensors["master"])
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[name], name)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(tensors["master"])

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


def _partition(full: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's part of a tensor that ZeRO-3 cuts like its ``parameter``: equal parts, the last one padded."""
    size = parameter.ds_tensor.numel()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = torch.nn.functional.pad(full.flatten(), (0, size * world_size - full.numel()))
    return padded[rank * size : (rank + 1) * size]


def save_checkpoint(
    folder: str, step: int, engine, strategy: Strategy, position: dict, identity: dict, max_num: int, max_gb: float
) -> None:
    """Write ``folder/global_step<step>`` and drop the oldest checkpoints beyond ``max_num`` or ``max_gb``.

    Args:
        position: JSON-ready counters of the trainer; returned by :func:`load_checkpoint`.
        identity: JSON-ready; what a run that resumes must have in common, see ``training/identity.py``.
    """
    state = EngineState(engine)
    tensors = {}
    for name, parameter in state.parameters():
        values = state.read(parameter)
        if strategy.is_rank_0():
            tensors.update({f"{kind}.{name}": value for kind, value in values.items()})
    rng_states: list[dict] = [{}] * strategy.world_size
    torch.distributed.all_gather_object(rng_states, _rng_state())
    if strategy.is_rank_0():
        final = os.path.join(folder, f"global_step{step}")
        unfinished = final + ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        save_file(tensors, os.path.join(unfinished, "trainable.safetensors"))
        rng = {f"{rank}.{name}": value for rank, states in enumerate(rng_states) for name, value in states.items()}
        save_file(rng, os.path.join(unfinished, "rng.safetensors"))
        record = {
            "step": step,
            "world_size": strategy.world_size,
            "updates": state.updates,
            "loss_scale": state.loss_scale,
            "scheduler": _json_ready(engine.lr_scheduler.state_dict()),
            "position": position,
            "identity": identity,
        }
        with open(os.path.join(unfinished, "state.json"), "w") as file:
            json.dump(record, file, indent=2)
        checksums = {name: file_sha256(os.path.join(unfinished, name)) for name in sorted(os.listdir(unfinished))}
        with open(os.path.join(unfinished, _CHECKSUMS), "w") as file:
            json.dump(checksums, file, indent=2)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
        _drop_oldest(folder, max_num, max_gb)
    strategy.barrier()


def read_state(checkpoint: str) -> dict:
    """``state.json`` of a whole checkpoint."""
    with open(os.path.join(checkpoint, "state.json")) as file:
        return json.load(file)


def load_checkpoint(checkpoint: str, engine, strategy: Strategy) -> dict:
    """Restore a checkpoint found by :func:`newest_checkpoint`, of a run with the same identity.

    The engine must have made one update, so that its optimizer state exists; all that the update changed is
    overwritten. The learning rate goes on where this run's own schedule has it, which has more steps than that of the
    checkpoint where ``--train.max_epochs`` was raised.

    Returns:
        The ``position`` that was saved.

    Raises:
        UserError: the checkpoint has other parameters.
    """
    record = read_state(checkpoint)
    state = EngineState(engine)
    with safe_open(os.path.join(checkpoint, "trainable.safetensors"), framework="pt") as tensors:
        _check_same_parameters(checkpoint, tensors, state.parameters())
        for name, parameter in state.parameters():
            state.write(parameter, {kind: tensors.get_tensor(f"{kind}.{name}") for kind in ("master", *MOMENTS)})
    state.updates = record["updates"]
    state.loss_scale = record["loss_scale"]
    _restore_schedule(engine, record["scheduler"])
    if record["world_size"] == strategy.world_size:
        rng = load_file(os.path.join(checkpoint, "rng.safetensors"))
        prefix = f"{strategy.get_rank()}."
        _set_rng_state({name[len(prefix) :]: value for name, value in rng.items() if name.startswith(prefix)})
    else:
        log.info(
            f"{checkpoint} was written by {record['world_size']} ranks, this run has {strategy.world_size}: "
            "same batches, new dropout masks"
        )
    return record["position"]


def _restore_schedule(engine, saved: dict) -> None:
    scheduler = engine.lr_scheduler
    scheduler.load_state_dict({**scheduler.state_dict(), **saved})
    # Every scheduler of transformers that the flags allow is a LambdaLR: a function of the steps done.
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    scheduler._last_lr = rates
    for group, lr in zip(engine.optimizer.param_groups, rates):
        group["lr"] = lr


def _check_same_parameters(checkpoint: str, tensors, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
    prefix = "master."
    saved = {
        name[len(prefix) :]: tuple(tensors.get_slice(name).get_shape())
        for name in tensors.keys()
        if name.startswith(prefix)
    }
    here = {name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in parameters}
    different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if different:
        raise UserError(
            f"{checkpoint} belongs to a run that trained other parameters ({different[0]}): resume it with the same "
            "model, --ds.lora.rank, --ds.lora.target_modules and --value.hidden_size"
        )


def newest_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint in ``folder``, None where there is none at all; damaged ones are named.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    if not os.path.isdir(folder):
        return None
    found = sorted((int(match[1]), match[0]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)
    damages = []
    for _, name in reversed(found):
        path = os.path.join(folder, name)
        damage = _damage(path)
        if damage is None:
            return path
        log.info(f"{path} is damaged and not used ({damage}): looking for the one before")
        damages.append(f"{name}: {damage}")
    if damages:
        raise UserError(
            f"{folder} has no whole checkpoint ({'; '.join(damages)}): put a copy there, or start again with "
            "--ckpt.overwrite; nothing was deleted"
        )
    return None


def _damage(checkpoint: str) -> str | None:
    """What is wrong with it; None where every file is what was written."""
    try:
        with open(os.path.join(checkpoint, _CHECKSUMS)) as file:
            checksums = json.load(file)
        for name, expected in checksums.items():
            if file_sha256(os.path.join(checkpoint, name)) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        name = os.path.basename(error.filename)
        return f"{name} is missing" + (": half copied, or of an earlier version" if name == _CHECKSUMS else "")
    except OSError as error:
        return f"{os.path.basename(error.filename or _CHECKSUMS)} cannot be read ({error.strerror})"
    except (ValueError, AttributeError):
        return f"{_CHECKSUMS} is not what was written"
    return None if "state.json" in checksums else f"{_CHECKSUMS} is not what was written"


def _drop_oldest(folder: str, max_num: int, max_gb: float) -> None:
    steps = sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)
    paths = [os.path.join(folder, f"global_step{step}") for step in steps]
    sizes = [sum(entry.stat().st_size for entry in os.scandir(path)) for path in paths]
    # The one just written always stays.
    while len(paths) > 1 and (len(paths) > max_num or sum(sizes) > max_gb * 1024**3):
        shutil.rmtree(paths.pop(0))
        sizes.pop(0)


def _json_ready(state: dict) -> dict:
    """A scheduler's state without the functions some schedulers keep in it."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}


def _rng_state() -> dict[str, torch.Tensor]:
    # Dropout draws from torch alone; the order of the data depends on the seed and the epoch only.
    states = {"torch": torch.get_rng_state()}
    if not on_cpu():
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


def _set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "accelerator" in states and not on_cpu():
        get_accelerator().set_rng_state(states["accelerator"])
