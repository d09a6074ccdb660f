"""What a run finds in its folders: nothing, a run to go on with, or another run."""

import json
import os
import socket
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.trainer.checkpoint import newest_checkpoint, read_state
from pipa_openrlhf.trainer.identity import RunIdentity, difference, identify


@dataclass(frozen=True)
class Start:
    """Where a run starts; the same on every rank.

    Attributes:
        identity: of the run that starts.
        checkpoint: to resume; None: from step 0.
        finished: the output folder holds this very run, finished.
        earlier: identities that must be met, by the path that keeps them.
    """

    identity: RunIdentity
    checkpoint: str | None = None
    finished: bool = False
    earlier: tuple[tuple[str, dict], ...] = ()

    def with_data(self, fingerprint: str, strategy: Strategy) -> "Start":
        """The same once the data are read. A collective call.

        Raises:
            UserError: ranks read other data than rank 0, or the earlier run did.
        """
        ranks: list[tuple[str, str] | None] = [None] * strategy.world_size
        torch.distributed.all_gather_object(ranks, (socket.gethostname(), fingerprint))
        others = [f"rank {rank} ({host})" for rank, (host, found) in enumerate(ranks) if found != ranks[0][1]]
        if others:
            raise UserError(
                f"--data.dataset: {', '.join(others)} got other samples than rank 0 ({ranks[0][0]}): give every node "
                "the same data, tokenizer and package versions"
            )
        here = replace(self, identity=self.identity.with_data(fingerprint))
        here.refuse_another_run()
        return here

    def refuse_another_run(self) -> None:
        """Compare with the runs that are there.

        Raises:
            UserError: one differs in a flag, which is named with both values.
        """
        for path, record in self.earlier:
            different = difference(record, self.identity)
            if different:
                raise UserError(
                    f"{path} holds a run with {different}: resume it with the same one, or give another "
                    "--ckpt.output_dir"
                )


def find_start(args: SimpleNamespace, objective: Objective, checkpoint_folder: str, strategy: Strategy) -> Start:
    """Look for an earlier run on rank 0 and tell every rank. A collective call.

    Raises:
        UserError: with ``--ckpt.load_enable``, the folders hold another run.
    """
    return strategy.from_rank_0(lambda: _find_start(args, objective, checkpoint_folder, strategy.print))


def _find_start(args: SimpleNamespace, objective: Objective, checkpoint_folder: str, say) -> Start:
    if not args.ckpt.load_enable:
        return Start(identify(args, objective))
    checkpoint = newest_checkpoint(checkpoint_folder, say)
    last_args = _last_args(args.ckpt.output_dir)
    found = {}
    if checkpoint is not None:
        found[checkpoint] = read_state(checkpoint)["identity"]
    if last_args is not None:
        found[args.ckpt.output_dir] = last_args.get("resolved.identity")
    for path, record in found.items():
        if not isinstance(record, dict) or "digest" not in record:
            raise UserError(
                f"{path} was written by a version that did not keep what decides a run: delete it with "
                "--ckpt.overwrite, or give another --ckpt.output_dir"
            )
    started = next((record["started"] for record in found.values()), None)
    start = Start(identify(args, objective, started), checkpoint, earlier=tuple(found.items()))
    start.refuse_another_run()
    if last_args is not None and last_args.get("resolved.finished"):
        if found[args.ckpt.output_dir]["max_epochs"] == args.train.max_epochs:
            return replace(start, finished=True)
        if checkpoint is None:
            raise UserError(
                f"{args.ckpt.output_dir} holds a finished run without a checkpoint, so that more --train.max_epochs "
                "cannot go on from it: give another --ckpt.output_dir, or --ckpt.overwrite"
            )
    if checkpoint is None:
        say(f"No checkpoint in {checkpoint_folder}: starting from step 0")
    return start


def _last_args(output_dir: str) -> dict | None:
    """``args.json`` of the last run in ``output_dir``; None where there is none, or only half of one."""
    try:
        with open(os.path.join(output_dir, "args.json")) as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
