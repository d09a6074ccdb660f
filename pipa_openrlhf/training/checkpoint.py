"""Resumable checkpoints: trainable state by parameter name, independent of ZeRO stage and number of ranks.

A checkpoint is a folder ``global_stepN`` with ``trainable-<rank>-<number>.safetensors`` (float32 master weights and
Adam moments, of every rank those that are its own), ``rng.safetensors`` (generator states of every rank),
``state.json`` (scheduler, position in the data, counters) and ``checksums.json`` (of all of these, written last). It
is written to a temporary name and renamed, so a folder is whole or absent; what happens to it later, on a disk or
while it is copied, shows in the checksums. All nodes must see the folder.
"""

import glob
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from functools import partial

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipa_openrlhf.distributed.strategy import Strategy, on_cpu
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.lag import first_missing
from pipa_openrlhf.prior.cache import file_sha256
from pipa_openrlhf.training.engine_state import EngineState

log = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_UNFINISHED = ".unfinished"  # after its name: being written, or deleted
_NAME = re.compile(r"global_step(\d+)")
# A rank writes a file when it has this much in memory.
FILE_BYTES = 1 << 30


def save_checkpoint(
    folder: str, step: int, engine, strategy: Strategy, position: dict, identity: dict, max_num: int, max_gb: float
) -> None:
    """Write ``folder/global_step<step>`` and drop the oldest checkpoints beyond ``max_num`` or ``max_gb``. Collective.

    Args:
        position: JSON-ready counters of the trainer; returned by :func:`load_checkpoint`.
        identity: JSON-ready; what a run that resumes must have in common, see ``training/identity.py``.

    Raises:
        UserError: on every rank, where the disk of one does not take it; nothing is left then.
    """
    state, final = EngineState(engine), os.path.join(folder, f"global_step{step}")
    parts: list[dict] = [{}] * strategy.world_size
    strategy.from_rank_0(lambda: _try(final, lambda: _make_way(final)))
    torch.distributed.all_gather_object(parts, _write_part(final + _UNFINISHED, state, strategy.get_rank()))
    record = {
        "step": step,
        "world_size": strategy.world_size,
        "updates": state.updates,
        "loss_scale": state.loss_scale,
        "scheduler": _json_ready(engine.lr_scheduler.state_dict()),
        "shapes": _shapes(state),
        "position": position,
        "identity": identity,
    }

    def finish() -> None:
        _finish(final, parts, record)
        _drop_oldest(folder, max_num, max_gb)

    strategy.from_rank_0(lambda: _try(final, finish))


def _try(final: str, function: Callable[[], None]) -> None:
    """Raises UserError for an error of the disk, after removing what is unfinished."""
    try:
        function()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(final + _UNFINISHED, ignore_errors=True)
        raise UserError(
            f"the checkpoint {final} cannot be written ({first_line(error)}): make room, and go on from the one "
            "before with --ckpt.load_enable"
        ) from error


def _make_way(final: str) -> None:
    for left in glob.glob(os.path.join(glob.escape(os.path.dirname(final)), f"global_step*[0-9]{_UNFINISHED}")):
        shutil.rmtree(left)  # of a run that was killed
    os.makedirs(final + _UNFINISHED)


def _write_part(folder: str, state: EngineState, rank: int) -> dict:
    """What a rank adds to a checkpoint: ``checksums`` by file and ``rng``, or the ``error`` that its disk gave it."""
    checksums: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"trainable-{rank:05}-{len(checksums):05}.safetensors"
        save_file(waiting, os.path.join(folder, name))
        checksums[name] = file_sha256(os.path.join(folder, name))
        waiting.clear()

    try:
        os.makedirs(folder, exist_ok=True)  # a file server may not show it yet
        for name, parameter in state.parameters():
            piece = state.read(parameter)
            waiting.update({f"{kind}.{name}@{piece.start}": part for kind, part in piece.tensors.items() if len(part)})
            if sum(one.nbytes for one in waiting.values()) >= FILE_BYTES:
                write()
        if waiting:
            write()
    except (OSError, SafetensorError) as error:
        return {"error": f"{first_line(error)}, rank {rank}"}
    return {"checksums": checksums, "rng": _rng_state()}


def _finish(final: str, parts: list[dict], record: dict) -> None:
    """Put the ranks' parts together under the checkpoint's own name."""
    unfinished = final + _UNFINISHED
    for part in parts:
        if "error" in part:
            raise OSError(part["error"])
    checksums = {name: digest for part in parts for name, digest in part["checksums"].items()}
    if missing := first_missing(unfinished, list(checksums)):
        raise OSError(f"{missing} of another node is not there: --ckpt.path must be a folder that all nodes see")
    rng = {f"{rank}.{name}": value for rank, part in enumerate(parts) for name, value in part["rng"].items()}
    save_file(rng, os.path.join(unfinished, "rng.safetensors"))
    with open(os.path.join(unfinished, "state.json"), "w") as file:
        json.dump(record, file, indent=2)
    checksums.update({name: file_sha256(os.path.join(unfinished, name)) for name in ("rng.safetensors", "state.json")})
    with open(os.path.join(unfinished, _CHECKSUMS), "w") as file:
        json.dump(checksums, file, indent=2)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)


def delete_checkpoint(path: str) -> None:
    """Delete a checkpoint, which is whole until it has another name."""
    os.rename(path, path + _UNFINISHED)
    shutil.rmtree(path + _UNFINISHED)


def read_state(checkpoint: str) -> dict:
    """``state.json`` of a whole checkpoint."""
    return _read_json(checkpoint, "state.json")


def _read_json(checkpoint: str, name: str) -> dict:
    with open(os.path.join(checkpoint, name)) as file:
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
    files = _read_json(checkpoint, _CHECKSUMS)
    if missing := first_missing(checkpoint, list(files)):
        # Another rank found it whole.
        node = socket.gethostname()
        raise UserError(f"{node} does not see {missing} of {checkpoint}: --ckpt.path must be one that all nodes see")
    record = read_state(checkpoint)
    state = EngineState(engine)
    _check_same_parameters(checkpoint, record["shapes"], _shapes(state))
    pieces = _Pieces(checkpoint, [name for name in files if name.startswith("trainable-")])
    for name, parameter in state.parameters():
        state.write(parameter, partial(pieces.read, name))
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


def _shapes(state: EngineState) -> dict[str, list[int]]:
    return {name: list(getattr(one, "ds_shape", one.shape)) for name, one in state.parameters()}


def _check_same_parameters(checkpoint: str, saved: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if different:
        raise UserError(
            f"{checkpoint} belongs to a run that trained other parameters ({different[0]}): resume it with the same "
            "model, --ds.lora.rank, --ds.lora.target_modules and --value.hidden_size"
        )


class _Pieces:
    """The pieces that all ranks of another run wrote, memory-mapped."""

    def __init__(self, checkpoint: str, names: list[str]):
        self._of: dict[str, list] = {}
        for path in names:
            file = safe_open(os.path.join(checkpoint, path), framework="pt").__enter__()
            for key in file.keys():
                name, _, start = key.rpartition("@")
                self._of.setdefault(name, []).append((int(start), file.get_slice(key)))

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start] of the flattened parameter ``name``."""
        result = torch.full((stop - start,), math.nan)
        for first, piece in self._of[f"{kind}.{name}"]:
            low, high = max(start, first), min(stop, first + piece.get_shape()[0])
            if low < high:
                result[low - start : high - start] = piece[low - first : high - first]
        return result


def newest_checkpoint(folder: str, strategy: Strategy) -> str | None:
    """The newest whole checkpoint in ``folder``, None where there is none at all; damaged ones are named. Every rank
    reads a share of the files. A collective call.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    damages = []
    for name in strategy.from_rank_0(lambda: _newest_first(folder)):
        path = os.path.join(folder, name)
        damage = _damage(path, strategy)
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


def _newest_first(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    found = sorted((int(match[1]), match[0]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)
    return [name for _, name in reversed(found)]


def _damage(checkpoint: str, strategy: Strategy) -> str | None:
    """What is wrong with it; None where every file is what was written. Collective: a rank reads every n-th file."""
    damage, checksums = strategy.from_rank_0(lambda: _read_checksums(checkpoint))
    if damage is not None:
        return damage
    found: list[str | None] = [None] * strategy.world_size
    mine = sorted(checksums)[strategy.get_rank() :: strategy.world_size]
    torch.distributed.all_gather_object(found, _damage_of_files(checkpoint, {name: checksums[name] for name in mine}))
    return next((one for one in found if one is not None), None)


def _read_checksums(checkpoint: str) -> tuple[str | None, dict[str, str]]:
    """What is wrong with a checkpoint at the first look, else None and the checksums of its files."""
    try:
        checksums = _read_json(checkpoint, _CHECKSUMS)
        names = set(checksums)
    except FileNotFoundError:
        return f"{_CHECKSUMS} is missing: half copied, or of an earlier version", {}
    except OSError as error:
        return f"{_CHECKSUMS} cannot be read ({error.strerror})", {}
    except (ValueError, TypeError):
        return f"{_CHECKSUMS} is not what was written", {}
    if missing := sorted(names - set(os.listdir(checkpoint))):
        return f"{missing[0]} is missing", {}
    if "trainable.safetensors" in names:
        return "it is of an earlier version", {}
    if "state.json" not in names or not isinstance(checksums, dict):
        return f"{_CHECKSUMS} is not what was written", {}
    return None, checksums


def _damage_of_files(checkpoint: str, checksums: dict[str, str]) -> str | None:
    if missing := first_missing(checkpoint, list(checksums)):
        return f"{missing} is not there for {socket.gethostname()}"
    for name, expected in checksums.items():
        try:
            if file_sha256(os.path.join(checkpoint, name)) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _drop_oldest(folder: str, max_num: int, max_gb: float) -> None:
    steps = sorted(int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match)
    paths = [os.path.join(folder, f"global_step{step}") for step in steps]
    sizes = [sum(entry.stat().st_size for entry in os.scandir(path)) for path in paths]
    # The one just written always stays.
    while len(paths) > 1 and (len(paths) > max_num or sum(sizes) > max_gb * 1024**3):
        delete_checkpoint(paths.pop(0))
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
