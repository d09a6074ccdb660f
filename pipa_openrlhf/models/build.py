"""The models of a run, as its flags describe them."""

from collections.abc import Callable
from types import SimpleNamespace

from transformers import PreTrainedModel

from pipa_openrlhf.distributed.devices import dtype_of
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models.dropout import disable_dropout
from pipa_openrlhf.models.loading import load_causal_lm
from pipa_openrlhf.models.policy import Policy, PolicyActor, add_lora
from pipa_openrlhf.models.value_head import ValueHead, load_value_head


def build_policy(
    args: SimpleNamespace,
    with_value_head: bool,
    fixed_value: float | None,
    balances_experts: bool,
    ds_config: dict,
    say: Callable[[str], None] = print,
) -> PolicyActor:
    """The policy: model, then LoRA, then the value head (all-linear LoRA would wrap a head attached before it).

    Args:
        fixed_value: g of a policy that needs a value but has no head.
        balances_experts: the MoE balancing loss is wanted.
        ds_config: DeepSpeed's training config.
        say: prints one line; silent on all ranks but the first.

    Raises:
        UserError: a model, target module or value head that does not fit.
    """
    lm = load_lm(args, args.model.model_name_or_path, ds_config)
    if not args.model.keep_dropout and disable_dropout(lm):
        say("The model's own dropout is off, so that the policy starts as its prior: --model.keep_dropout keeps it")
    config = lm.config.get_text_config()
    if balances_experts and not hasattr(config, "num_experts_per_tok"):
        raise UserError("--model.aux_loss_coef balances experts, and this model has none: leave it at 0")
    dtype = dtype_of(args.ds.param_dtype)
    if args.ds.lora.rank > 0:
        lora = args.ds.lora
        lm = add_lora(lm, lora.rank, lora.alpha, lora.target_modules, lora.dropout)
    head = None
    if with_value_head:
        if args.value.init_from:
            head = load_value_head(args.value.init_from, dtype)
            if head.dense.in_features != config.hidden_size:
                raise UserError(
                    f"--value.init_from {args.value.init_from}: made for hidden size {head.dense.in_features}, "
                    f"the model has {config.hidden_size}"
                )
        else:
            head = ValueHead(config.hidden_size, args.value.hidden_size or config.hidden_size, dtype)
    actor = PolicyActor(Policy(lm, head, 0.5 if fixed_value is None else fixed_value, balances_experts))
    if args.model.gradient_checkpointing_enable:
        actor.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": args.model.gradient_checkpointing_reentrant}
        )
    return actor


def load_lm(args: SimpleNamespace, path: str, ds_config: dict) -> PreTrainedModel:
    """The language model at ``path`` with the run's data type, attention and quantisation."""
    return load_causal_lm(
        path,
        dtype_of(args.ds.param_dtype),
        args.ds.attn_implementation,
        args.model.trust_remote_code,
        args.ds.experts_implementation,
        args.ds.load_in_4bit,
        args.ds.use_liger_kernel,
        ds_config,
    )
