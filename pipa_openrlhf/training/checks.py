"""Is the policy its own prior at the first step, as theory and the cached log-probs say?"""

import logging
import math
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param

from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.distributed.strategy import Strategy, device
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import Policy, PolicyOutput
from pipa_openrlhf.objectives.batch_loss import BatchCounts, BatchLoss, token_weights

log = logging.getLogger(__name__)

# Of the loss computed from equal log-probs: float32 sums.
_EXACT = 1e-5
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
        # Expected loss, the same by the objective's own account, sum of |log f - log p|, tokens, largest |u|.
        self._totals = torch.zeros(5, dtype=torch.float64, device=device())

    @torch.no_grad()
    def add(self, output: PolicyOutput, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        mask = batch.mask != 0
        as_prior = output._replace(log_f=torch.where(mask, batch.log_p, torch.zeros_like(batch.log_p)), loss=None)
        self._totals[0] += self._loss.share(as_prior, batch, self._counts, self._z0).double()
        self._totals[1] += self._theory(batch)
        self._totals[2] += torch.where(mask, output.log_f - batch.log_p, 0.0).abs().double().sum()
        self._totals[3] += mask.sum()
        self._totals[4] += output.u.abs().sum()

    def _theory(self, batch: Batch) -> float:
        """This micro-batch's share of the loss that the objective names for a policy that is its prior."""
        objective, counts = self._loss.objective, self._counts
        a_unit = objective.loss_at_prior or 0.0
        if objective.token_loss is not None:
            weights = token_weights(batch.mask, objective.reduction, counts) * batch.weight[:, None]
            return a_unit * weights.double().sum().item()
        of_units = batch.weight[:: counts.sequences // counts.units]
        return a_unit * of_units.double().sum().item() / counts.units

    def _has_theory(self, largest_u: float) -> bool:
        """Whether the loss is the objective's own and nothing else, with g = 1/2 and no estimate in it."""
        objective = self._loss.objective
        plain = not (objective.sft_coef or objective.nll_coef or self._loss.aux_coef)
        return objective.loss_at_prior is not None and plain and largest_u == 0 and float(self._z0) == 0

    def report(self, strategy: Strategy, loss: float, param_dtype: str) -> None:
        """Log a line where the policy is not its prior. A collective call.

        Args:
            loss: the step's.
            param_dtype: ``fp32``, ``fp16`` or ``bf16``.

        Raises:
            RuntimeError: the loss of a policy that is its prior is not what the theory says (ln 2 a token of PIPA and
                a pair of DPO): the loss itself is wrong.
        """
        expected, theory, distance, tokens, largest_u = strategy.all_reduce(self._totals).tolist()
        if self._has_theory(largest_u) and abs(expected - theory) > _EXACT * max(1.0, abs(theory)):
            raise RuntimeError(
                f"{self._loss.objective.name}: where the policy is its prior the loss must be {theory:.8g} "
                f"({self._loss.objective.loss_at_prior:.8g} each), it is {expected:.8g}"
            )
        if distance <= _NOISE[param_dtype] * tokens:
            return
        log.info(
            f"At step 0 the policy is not its own prior: log-probs differ by {distance / max(tokens, 1):.3g} nats a "
            f"token, the loss is {loss:.6g} and should be {expected:.6g}. Likely causes: dropout in the model, "
            "a model whose log-probs depend on what else is in a batch, or a prior cache made by other software"
        )


_SAMPLED = 256  # elements of a parameter
LANGUAGE_MODEL, VALUE_HEAD = "language model", "value head"


def report_trained(policy: Policy) -> None:
    """Print how many parameters are trained.

    Raises:
        UserError: none of the language model's.
    """
    trained = {part: sum(map(_size, parameters)) for part, parameters in _trained_parts(policy).items()}
    total = sum(map(_size, policy.parameters()))
    head = f", {trained[VALUE_HEAD]:,} of them in the value head" if trained[VALUE_HEAD] else ""
    log.info(f"{sum(trained.values()):,} of {total:,} parameters are trained{head}")
    if not trained[LANGUAGE_MODEL]:
        raise UserError(
            "no parameter of the language model would be trained: --model.model_name_or_path holds frozen weights, "
            "give --ds.lora.rank or another model"
        )


class UpdateCheck:
    """Asserts, once, that the first update with a learning rate and a gradient moves what is trained.

    The float32 masters are compared, since a small update vanishes in 16-bit weights. Collective: every rank looks at
    its own part.

    Args:
        engine: DeepSpeed's, around a :class:`Policy`.
    """

    def __init__(self, engine, strategy: Strategy):
        self._engine, self._strategy = engine, strategy
        self._before: dict[str, torch.Tensor] | None = None
        self._is_done = False

    def before_update(self) -> None:
        """Remember a few elements of every trained parameter."""
        if not self._is_done and max(self._engine.lr_scheduler.get_last_lr()) > 0:
            self._before = self._sample()

    def after_update(self, grad_norm: float) -> None:
        """Compare them.

        Raises:
            UserError: the language model or the value head did not move.
        """
        before, self._before = self._before, None
        # float16's loss scale skips updates, and a clipped batch may have no gradient at all.
        if before is None or not 0 < grad_norm < math.inf or not self._engine.was_step_applied():
            return
        after = self._sample()
        moved = torch.tensor([not torch.equal(before[part], after[part]) for part in before], device=device()).float()
        for part, has_moved in zip(before, self._strategy.all_reduce(moved, op="max").tolist()):
            if not has_moved:
                raise UserError(
                    f"the first update did not change the {part}: its parameters are not those of the optimizer, "
                    "or the objective does not depend on it"
                )
        self._is_done = True

    def _sample(self) -> dict[str, torch.Tensor]:
        """Elements of this rank's masters, by the part of the policy they belong to; parts without a rate are out."""
        config = self._strategy.args
        rates = {
            LANGUAGE_MODEL: max(config.adam.lr, config.muon.lr if config.optim == "muon" else 0),
            VALUE_HEAD: self._strategy.value_lr,
        }
        full = full_masters(self._engine)
        samples = {}
        for part, parameters in _trained_parts(self._engine.module).items():
            if parameters and rates[part] > 0:
                masters = [full.get(id(one), one) if full is not None else _local_master(one) for one in parameters]
                chosen = [_some(one.detach()).float() for one in masters if one is not None and one.numel()]
                samples[part] = torch.cat(chosen) if chosen else torch.zeros(0)
        return samples


def _trained_parts(policy: Policy) -> dict[str, list[torch.nn.Parameter]]:
    parts: dict[str, list[torch.nn.Parameter]] = {LANGUAGE_MODEL: [], VALUE_HEAD: []}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parts[VALUE_HEAD if name.startswith("value_head.") else LANGUAGE_MODEL].append(parameter)
    return parts


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def full_masters(engine) -> dict[int, torch.Tensor] | None:
    """Under ZeRO-0 the masters by parameter, where they are not the parameters themselves; else None."""
    if engine.zero_optimization_stage() != 0:
        return None
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    pairs = zip(sum(optimizer.fp16_groups, []), sum(optimizer.fp32_groups, []))
    return {id(parameter): master for parameter, master in pairs}


def _local_master(parameter: Any) -> torch.Tensor | None:
    """This rank's part of the master of DeepSpeed's parameter under ZeRO-1, 2 or 3; None where it has none."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_fp32_param(parameter)
    mapping = parameter._hp_mapping
    return None if mapping is None else mapping.get_hp_fragment()
