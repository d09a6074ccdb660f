"""Steps whose loss or gradient is NaN or infinite: they are left out, counted, and their records named."""

import logging
import math

import numpy as np
import torch

from pipa_openrlhf.data.training_set import MicroBatches
from pipa_openrlhf.distributed.transfer import on_device
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import PolicyActor
from pipa_openrlhf.objectives.batch_loss import BatchCounts, BatchLoss

log = logging.getLogger(__name__)

_MOST_SHOWN = 20


def spoil_if_bad(loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The last loss of a step, NaN where this rank's total is NaN or infinite: the step's whole gradient is NaN then,
    whatever it would have been. It is summed over ranks, so that all of them leave the update out. Nothing waits for
    the device.

    Args:
        loss: scalar, whose gradient ends the step's.
        total: scalar, the sum of this rank's losses in the step.
    """
    return loss * torch.where(torch.isfinite(total), 1.0, math.nan).to(loss.dtype)


@torch.no_grad()
def bad_records(
    micro_batches: MicroBatches,
    units: np.ndarray,
    actor: PolicyActor,
    loss: BatchLoss,
    counts: BatchCounts,
    z0: torch.Tensor,
) -> list[str]:
    """Places of the records of a global batch whose own loss is NaN or infinite; dropout is off. A collective call.

    Args:
        micro_batches: of one unit each.
    """
    actor.model.eval()
    data, found = micro_batches.data, []
    for own, micro_batch in zip(micro_batches.plan(units), on_device(micro_batches.answers(units)), strict=True):
        batch = micro_batch.batch
        output = actor(batch)
        if not micro_batch.is_idle and not torch.isfinite(loss.share(output, batch, counts, z0)):
            found += [data.samples[int(row)].where for row in data.rows(own)]
    actor.model.train()
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return sorted({place for places in gathered for place in places})


def count_bad_step(step: int, what: str, value: float, places: list[str], batch: list[str], count: int, most: int):
    """Say what is wrong with a step that was left out, and end the run where there are too many.

    Args:
        what: ``loss`` or ``gradient``, which is ``value``.
        places: of the records at fault; none where no record is it alone.
        batch: places of all records of the step.
        count: bad steps so far, this one included.
        most: ``--train.max_bad_steps``.

    Raises:
        UserError: ``count`` is more.
    """
    culprits = _shown(places) if places else f"no record of it alone, it holds {_shown(batch)}"
    log.info(f"Step {step} is left out, its {what} is {value}: {culprits} ({count} of at most {most} bad steps)")
    if count > most:
        raise UserError(
            f"the {what} of step {step} is {value}, the weights are those of the step before, and bad steps are more "
            f"than --train.max_bad_steps {most}: look at {_shown(places or batch, 3)}, lower the learning rate, or go "
            "back to a checkpoint with --ckpt.load_enable"
        )


def _shown(places: list[str], most: int = _MOST_SHOWN) -> str:
    rest = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + rest
