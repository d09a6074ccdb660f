"""Whether all nodes see the folders in which a rank reads what another one wrote."""

import logging
import os
import socket
import uuid

import torch

from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.lag import first_missing

log = logging.getLogger(__name__)


def check_seen_by_all(folders: dict[str, str], strategy: Strategy) -> None:
    """Refuse folders that rank 0 does not share with every rank. A collective call.

    Rank 0 writes a file of a random name, for which the others look. A folder that it cannot write to is left out:
    nothing is written there during the run.

    Args:
        folders: path by the flag that names it.

    Raises:
        UserError: names the nodes that do not see one, and the ways out.
    """
    if strategy.world_size == 1:
        return
    for flag, path in folders.items():
        folder = os.path.expanduser(path)
        token = f".seen_by_all.{uuid.uuid4().hex}"
        token = strategy.from_rank_0(lambda: _put(folder, token))  # noqa: B023  # called at once
        if token is None:
            continue
        sees = first_missing(folder, [token]) is None
        found: list[tuple[str, bool]] = [("", False)] * strategy.world_size
        torch.distributed.all_gather_object(found, (socket.gethostname(), sees))
        if strategy.is_rank_0():
            os.remove(os.path.join(folder, token))
        blind = [f"rank {rank} ({host})" for rank, (host, seen) in enumerate(found) if not seen]
        if blind:
            raise UserError(
                f"{flag} {folder}: {', '.join(blind)} does not see what rank 0 ({found[0][0]}) writes there: give a "
                f"folder on a file system that all nodes share{_WAYS_OUT.get(flag, '')}"
            )


_WITHOUT_CHECKPOINTS = ", or, for a run without checkpoints, --ckpt.disable_ds and no --ckpt.load_enable"
_WAYS_OUT = {"--ckpt.output_dir": _WITHOUT_CHECKPOINTS, "--ckpt.path": _WITHOUT_CHECKPOINTS}


def _put(folder: str, token: str) -> str | None:
    """``token``, once a file of that name is there; None where the folder cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, token), "w"):
            return token
    except OSError as error:
        log.info(f"{folder} cannot be written to ({error.strerror}): nodes are not asked whether they see it")
        return None
