"""What a run trains, and that its updates reach it."""

from collections.abc import Callable

import torch
from deepspeed.utils import safe_get_local_fp32_param

from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models.policy import Policy

_SAMPLED = 256  # elements of a parameter
LANGUAGE_MODEL, VALUE_HEAD = "language model", "value head"


def report_trained(policy: Policy, say: Callable[[str], None]) -> None:
    """Print how many parameters are trained.

    Raises:
        UserError: none of the language model's.
    """
    trained = {part: sum(map(_size, parameters)) for part, parameters in _trained_parts(policy).items()}
    total = sum(map(_size, policy.parameters()))
    head = f", {trained[VALUE_HEAD]:,} of them in the value head" if trained[VALUE_HEAD] else ""
    say(f"{sum(trained.values()):,} of {total:,} parameters are trained{head}")
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
        self._num_updates = 0
        self._is_done = False

    def before_update(self) -> None:
        """Remember a few elements of every trained parameter."""
        self._num_updates += 1
        if not self._is_done and max(self._engine.lr_scheduler.get_last_lr()) > 0:
            self._before = self._sample()

    def after_update(self, grad_norm: float) -> None:
        """Compare them.

        Raises:
            UserError: the language model or the value head did not move.
        """
        before, self._before = self._before, None
        # float16's loss scale skips updates, and a clipped batch may have no gradient at all.
        if before is None or not grad_norm > 0 or not self._engine.was_step_applied():
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

    def report(self) -> None:
        """Say so where no update could move anything: a short run may be all warm-up."""
        if self._num_updates and not self._is_done:
            self._strategy.print(
                "Nothing was trained: no update had both a gradient and a learning rate above 0 "
                "(--adam.lr, --lr_warmup_ratio)"
            )

    def _sample(self) -> dict[str, torch.Tensor]:
        """Elements of this rank's masters, by the part of the policy they belong to; parts without a rate are out."""
        args = self._strategy.args
        rates = {
            LANGUAGE_MODEL: max(args.adam.lr, args.muon.lr if args.optim == "muon" else 0),
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


def _local_master(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the master of a parameter under ZeRO-1, 2 or 3; None where it has none."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_fp32_param(parameter)
    mapping = parameter._hp_mapping
    return None if mapping is None else mapping.get_hp_fragment()
