"""The trained model: a language model with the value head grafted on, and OpenRLHF's Actor around it.

The value head g: will the next token be right? (paper, sections 2.5 and 3.1)
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.distributed.strategy import dtype_of
from pipa_openrlhf.distributed.upstream import Actor, set_z3_leaf_modules
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import base_model
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.model.output_head import decoder_of, install_chunked_head, only_accepted
from pipa_openrlhf.model.shared_prefixes import enable_shared_prefixes, refuse_other_attention
from pipa_openrlhf.objectives.batch_loss import PolicyOutput, TokenTerms
from pipa_openrlhf.objectives.objective import Objective

log = logging.getLogger(__name__)

HEAD_WEIGHTS_FILE = "value_head.safetensors"
HEAD_CONFIG_FILE = "value_head_config.json"


class ValueHead(nn.Module):
    """Linear(d, h) -> ReLU -> Linear(h, 1). Its sigmoid is g = p(c_t = 1 | x, y_<t).

    The last layer starts at zero, so that g = 0.5 everywhere at step 0 (Figure 3).
    """

    def __init__(self, input_size: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.dense = nn.Linear(input_size, hidden_size, dtype=dtype)
        self.out = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] hidden states that predict y_t -> [...] logits u_t, float32 or wider."""
        u = self.out(torch.relu(self.dense(hidden))).squeeze(-1)
        return u.to(torch.promote_types(u.dtype, torch.float32))


def save_value_head(folder: str, state: dict[str, torch.Tensor]) -> None:
    """Write ``dense.weight``, ``dense.bias``, ``out.weight``, ``out.bias`` and the head's config to ``folder``."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, os.path.join(folder, HEAD_WEIGHTS_FILE))
    hidden_size, input_size = state["dense.weight"].shape
    config = {"input_size": input_size, "hidden_size": hidden_size, "activation": "relu"}
    with open(os.path.join(folder, HEAD_CONFIG_FILE), "w") as file:
        json.dump(config, file, indent=2)


def load_value_head(folder: str, dtype: torch.dtype) -> ValueHead:
    """The value head exported to ``folder``.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    weights, config = (os.path.join(folder, name) for name in (HEAD_WEIGHTS_FILE, HEAD_CONFIG_FILE))
    for path in (weights, config):
        if not os.path.isfile(path):
            raise UserError(f"no value head in {folder}: {path} does not exist")
    try:
        with open(config) as file:
            sizes = json.load(file)
        head = ValueHead(sizes["input_size"], sizes["hidden_size"], dtype)
        head.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{weights} with {HEAD_CONFIG_FILE} is not a value head of this package: {first_line(error)}"
        ) from error
    return head


class Policy(nn.Module):
    """Backbone and value head in one module, because only one module reaches DeepSpeed.

    Attributes:
        lm: the causal language model, wrapped by PEFT under LoRA.
        value_head: None where the objective has no learned value; g is then ``fixed_value`` everywhere.
        balances_experts: compute the MoE balancing loss too.
        can_share_prefixes: sequences may come in one row that holds a common prefix once; a balancing loss counts the
            tokens of every sequence.
    """

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        value_head: ValueHead | None = None,
        fixed_value: float = 0.5,
        balances_experts: bool = False,
    ):
        super().__init__()
        self.lm = lm
        self.value_head = value_head
        self.fixed_value = fixed_value
        self.balances_experts = balances_experts
        causal_lm = self.causal_lm
        # Plain references: registering them again would double their names in the state dict.
        self._backbone = [decoder_of(causal_lm)]
        self._output_head = [install_chunked_head(causal_lm)]
        self.can_share_prefixes = enable_shared_prefixes(causal_lm) and not balances_experts

    def forward(
        self, batch: Batch, terms: TokenTerms | None = None, with_value: bool = True, own: bool = False
    ) -> PolicyOutput:
        """One forward pass for both heads, on the wanted response tokens of ``batch`` only, once a distinct one.

        Args:
            terms: a token-separable loss of the wanted tokens, to be computed in the same pass as log f_t, which then
                carries no gradient of its own.
            with_value: False where only log f is wanted; u is then 0.
            own: log f from the model's own forward pass and its whole logits, which ours must agree with; no value.
        """
        if own:
            return self._own_forward(batch)
        options: dict[str, Any] = {"output_router_logits": True} if self.balances_experts else {}
        attention_mask = batch.attention_mask
        if batch.shared_row is not None:
            options["shared_row"] = batch.shared_row
            attention_mask = refuse_other_attention(batch.input_ids)
        # With a mask, positions are left to the model, as it counts them itself: some do not count from 0.
        if batch.shared_row is not None or attention_mask is None:
            options["position_ids"] = batch.position_ids
        options.update(only_accepted(self._backbone[0], use_cache=False))
        output = self._backbone[0](input_ids=batch.input_ids, attention_mask=attention_mask, **options)
        hidden = output.last_hidden_state
        aux_loss = self._balancing_loss(output, attention_mask) if self.balances_experts else hidden.new_zeros(())
        hidden = hidden.flatten(0, 1).index_select(0, batch.hidden_index)
        u = self._value_logits(hidden) if with_value else torch.zeros(hidden.shape[:1], device=hidden.device)
        if terms is None:
            log_f = self._output_head[0](hidden, batch.targets)
            return PolicyOutput(batch.spread(log_f), batch.spread(u), aux_loss)
        log_f, loss = self._output_head[0](hidden, batch.targets, u, terms)
        if u.requires_grad:
            # The same loss again with log f fixed: its value cancels, its gradient reaches the value head.
            through_u = terms.loss(log_f, u)
            loss = loss + (through_u - through_u.detach())
        return PolicyOutput(batch.spread(log_f), batch.spread(u.detach()), aux_loss, loss)

    def _own_forward(self, batch: Batch) -> PolicyOutput:
        given = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        options = only_accepted(self.causal_lm, use_cache=False)
        logits = self.lm(input_ids=batch.input_ids, **given, **options).logits
        wanted = logits.flatten(0, 1).index_select(0, batch.hidden_index).float()
        log_f = torch.log_softmax(wanted, -1).gather(1, batch.targets[:, None])[:, 0]
        return PolicyOutput(batch.spread(log_f), torch.zeros_like(batch.log_p), log_f.new_zeros(()))

    def _value_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.value_head is not None:
            return self.value_head(hidden)
        g = self.fixed_value
        return torch.full(hidden.shape[:1], math.log(g) - math.log1p(-g), device=hidden.device)

    def _balancing_loss(self, output, attention_mask: torch.Tensor | None) -> torch.Tensor:
        config: Any = self._backbone[0].config
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        loss = load_balancing_loss_func(output.router_logits, experts, config.num_experts_per_tok, attention_mask)
        return cast(torch.Tensor, loss)  # a number only where there are no logits

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict) -> None:
        """Recompute the backbone's activations in the backward pass; Actor calls this."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        if not gradient_checkpointing_kwargs["use_reentrant"]:
            # transformers makes the embeddings' output require a gradient; only reentrant checkpoints need one there.
            self.causal_lm.disable_input_require_grads()

    @property
    def attention_work(self) -> float:
        """Work of a token for each token of its sequence, as a share of its other work in the backbone.

        A weight multiplies a token once. Attention has, in every layer, a product with each key before it and one
        with each value: twice the hidden size for half the tokens of a sequence, on average.
        """
        config = self.causal_lm.config.get_text_config()
        backbone = self._backbone[0]
        tables = {one.weight for one in backbone.modules() if isinstance(one, nn.Embedding)}
        # ZeRO-3 leaves a rank its part of a parameter, and its whole size beside it.
        weights = sum(getattr(one, "ds_numel", one.numel()) for one in backbone.parameters() if one not in tables)
        return config.num_hidden_layers * config.hidden_size / weights

    @property
    def bytes_a_token(self) -> int:
        """Memory that a token takes in a forward pass without gradients, at most: what one layer holds at once."""
        config = self.causal_lm.config.get_text_config()
        inner = getattr(config, "intermediate_size", None)
        wide = inner if isinstance(inner, int) else 4 * config.hidden_size
        copies = getattr(config, "num_experts_per_tok", None) or 1
        # Some residual streams in float32; query, key, value, their rotations and copies for sequences of their own;
        # gate, up, their product and what lies between; of every expert of a token.
        numbers = 24 * config.hidden_size + 6 * copies * (wide + config.hidden_size)
        return numbers * cast(nn.Embedding, self.causal_lm.get_input_embeddings()).weight.element_size()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The language model without PEFT's wrapper."""
        return base_model(self.lm) if isinstance(self.lm, PeftModel) else self.lm


class PolicyActor(Actor):
    """OpenRLHF's Actor around a :class:`Policy`; ``actor.model`` is what the strategy hands to DeepSpeed.

    Attributes:
        layout: of a micro-batch, see ``data/batch.py``; padded until another one is chosen.
        tolerance: nats a token by which rounding may change log-probs; None where that was not measured.
    """

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.layout = "padded"
        self.tolerance: float | None = None
        set_z3_leaf_modules(policy, detect_hybrid=False)

    @property
    def policy(self) -> Policy:
        """``model``, or what is inside where it is DeepSpeed's engine."""
        return self.model if isinstance(self.model, Policy) else self.model.module

    @property
    def attention(self) -> str:
        """The attention kernel in use."""
        return self.policy.causal_lm.config._attn_implementation

    def forward(self, batch: Batch, terms: TokenTerms | None = None, with_value: bool = True) -> PolicyOutput:
        """The policy's output on ``batch``; see :meth:`Policy.forward`."""
        return self.model(batch=batch, terms=terms, with_value=with_value)


def add_lora(
    lm: PreTrainedModel, rank: int, alpha: int, target_modules: str | Sequence[str], dropout: float
) -> PeftModel:
    """LoRA as OpenRLHF attaches it.

    Raises:
        UserError: the target modules do not exist, or include the output head.
    """
    modules: str | list[str] = target_modules if isinstance(target_modules, str) else list(target_modules)
    if modules == ["all-linear"]:  # as a command line gives it
        modules = "all-linear"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        lora_dropout=dropout,
        bias="none",
    )
    try:
        # DeepSpeed keeps float32 masters itself, and ZeRO-3 needs all parameters of one dtype.
        model = get_peft_model(lm, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"--ds.lora.target_modules: {first_line(error)}") from error
    if hasattr(base_model(model).get_output_embeddings(), "lora_A"):
        raise UserError("--ds.lora.target_modules: LoRA on the output head is not supported; leave it out")
    return model


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
