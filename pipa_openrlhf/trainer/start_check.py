"""Is the policy its own prior at the first step, as theory and the cached log-probs say?"""

import torch

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.losses.reduction import BatchCounts
from pipa_openrlhf.models.policy import PolicyOutput
from pipa_openrlhf.trainer.batch_loss import BatchLoss

# Mean distance of a token's log-probs, in nats, that two ways to compute the same model may have.
_NOISE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.1}


class StartCheck:
    """Compares the first global batch with what it must be where the policy equals the prior: every log-ratio 0, so
    that PIPA's loss is ln 2 a token with a new value head, DPO's ln 2 a pair and KTO's 1/2 an answer.

    Args:
        loss: of the run.
        counts, z0: of the first global batch.
    """

    def __init__(self, loss: BatchLoss, counts: BatchCounts, z0: torch.Tensor):
        self._loss, self._counts, self._z0 = loss, counts, z0
        # Expected loss, sum of |log f - log p|, tokens.
        self._totals = torch.zeros(3, dtype=torch.float64, device=device())

    @torch.no_grad()
    def add(self, output: PolicyOutput, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        mask = batch.mask != 0
        as_prior = output._replace(log_f=torch.where(mask, batch.log_p, torch.zeros_like(batch.log_p)), loss=None)
        self._totals[0] += self._loss.share(as_prior, batch, self._counts, self._z0).double()
        self._totals[1] += torch.where(mask, output.log_f - batch.log_p, 0.0).abs().double().sum()
        self._totals[2] += mask.sum()

    def report(self, strategy: Strategy, loss: float, param_dtype: str) -> None:
        """Print a line where the policy is not its prior. A collective call.

        Args:
            loss: the step's.
            param_dtype: ``fp32``, ``fp16`` or ``bf16``.
        """
        expected, distance, tokens = strategy.all_reduce(self._totals).tolist()
        if distance <= _NOISE[param_dtype] * tokens:
            return
        strategy.print(
            f"At step 0 the policy is not its own prior: log-probs differ by {distance / max(tokens, 1):.3g} nats a "
            f"token, the loss is {loss:.6g} and should be {expected:.6g}. Likely causes: dropout in the model, "
            "a model whose log-probs depend on what else is in a batch, or a prior cache made by other software"
        )
