"""The models of a run, as its flags describe them."""

import logging
from collections.abc import Iterator

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.devices import dtype_of
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.model.policy import Policy, PolicyActor, add_lora
from pipa_openrlhf.model.value_head import ValueHead, load_value_head
from pipa_openrlhf.objectives.objective import Objective

log = logging.getLogger(__name__)


def build_policy(
    run: RunConfig,
    objective: Objective,
    ds_config: dict,
) -> PolicyActor:
    """The policy: model, then LoRA, then the value head (all-linear LoRA would wrap a head attached before it).

    Args:
        ds_config: DeepSpeed's training config.

    Raises:
        UserError: a model, target module or value head that does not fit.
    """
    lm = load_lm(run, run.model.path, ds_config)
    balances_experts = run.model.aux_loss_coef > 0
    if not run.model.keep_dropout and disable_dropout(lm):
        log.info(
            "The model's own dropout is off, so that the policy starts as its prior: --model.keep_dropout keeps it"
        )
    config = lm.config.get_text_config()
    if balances_experts and not hasattr(config, "num_experts_per_tok"):
        raise UserError("--model.aux_loss_coef balances experts, and this model has none: leave it at 0")
    dtype = dtype_of(run.ds.param_dtype)
    adapted: PreTrainedModel | PeftModel = lm
    if run.ds.lora.rank > 0:
        lora = run.ds.lora
        adapted = add_lora(lm, lora.rank, lora.alpha, lora.target_modules, lora.dropout)
    head = None
    if objective.learns_value:
        if run.value.init_from:
            head = load_value_head(run.value.init_from, dtype)
            if head.dense.in_features != config.hidden_size:
                raise UserError(
                    f"--value.init_from {run.value.init_from}: made for hidden size {head.dense.in_features}, "
                    f"the model has {config.hidden_size}"
                )
        else:
            head = ValueHead(config.hidden_size, run.value.hidden_size or config.hidden_size, dtype)
    actor = PolicyActor(
        Policy(adapted, head, 0.5 if objective.fixed_value is None else objective.fixed_value, balances_experts)
    )
    if run.model.gradient_checkpointing_enable:
        actor.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": run.model.gradient_checkpointing_reentrant}
        )
    return actor


def load_lm(run: RunConfig, path: str, ds_config: dict) -> PreTrainedModel:
    """The language model at ``path`` with the run's data type, attention and quantisation."""
    return load_causal_lm(
        path,
        dtype_of(run.ds.param_dtype),
        run.ds.attn_implementation,
        run.model.trust_remote_code,
        run.ds.experts_implementation,
        run.ds.load_in_4bit,
        run.ds.use_liger_kernel,
        ds_config,
    )


def disable_dropout(model: nn.Module) -> int:
    """Turn off all dropout of ``model``: modules, and the numbers that its attention reads from itself or its config.

    Returns:
        How many of them were on.
    """
    settings = [(holder, name) for holder in _holders(model) for name in _dropout_names(holder)]
    for holder, name in settings:
        setattr(holder, name, 0.0)
    return len(settings)


def _dropout_names(holder: nn.Module | PreTrainedConfig) -> list[str]:
    is_dropout = isinstance(holder, nn.Module) and "drop" in type(holder).__name__.lower()
    return [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and ("drop" in name.lower() or (is_dropout and name == "p"))
    ]


def _holders(model: nn.Module) -> Iterator[nn.Module | PreTrainedConfig]:
    waiting: list[nn.Module | PreTrainedConfig] = list(model.modules())
    seen: set[int] = set()
    while waiting:
        holder = waiting.pop()
        if id(holder) not in seen:
            seen.add(id(holder))
            yield holder
            waiting += [value for value in vars(holder).values() if isinstance(value, PreTrainedConfig)]
