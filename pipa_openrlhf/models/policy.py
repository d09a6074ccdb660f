"""The trained model: a language model with the value head grafted on, and OpenRLHF's Actor around it."""

import math
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipa_openrlhf.data.batch import Batch, SharedRow
from pipa_openrlhf.distributed.upstream import Actor, set_z3_leaf_modules
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.token_terms import TokenTerms
from pipa_openrlhf.models.model_tail import decoder_of, only_accepted
from pipa_openrlhf.models.output_head import install_chunked_head
from pipa_openrlhf.models.shared_prompts import enable_shared_prompts, refuse_other_attention
from pipa_openrlhf.models.value_head import ValueHead


class PolicyOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        log_f, u: [B, T] float32, 0 at tokens not asked for.
        aux_loss: scalar, the MoE balancing loss, 0 where not wanted.
        loss: scalar, of the terms that were asked for; None without any.
    """

    log_f: torch.Tensor
    u: torch.Tensor
    aux_loss: torch.Tensor
    loss: torch.Tensor | None = None


class Policy(nn.Module):
    """Backbone and value head in one module, because only one module reaches DeepSpeed.

    Attributes:
        lm: the causal language model, wrapped by PEFT under LoRA.
        value_head: None where the objective has no learned value; g is then ``fixed_value`` everywhere.
        balances_experts: compute the MoE balancing loss too.
        can_share_prompts: answers to one prompt may come in one row; a balancing loss counts every prompt's tokens.
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
        self.can_share_prompts = enable_shared_prompts(causal_lm) and not balances_experts

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        hidden_index: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        token_index: torch.Tensor | None = None,
        response_shape: tuple[int, int] = (0, 0),
        terms: TokenTerms | None = None,
        shared_row: SharedRow | None = None,
        with_value: bool = True,
    ) -> PolicyOutput | torch.Tensor:
        """One forward pass for both heads, on the wanted response tokens only.

        Without ``hidden_index`` it is the model's own forward pass instead, and gives its logits [R, L, vocabulary].

        Args:
            input_ids, position_ids: [R, L]; R = B rows, or one.
            attention_mask: [R, L], or None for one row. With a mask, positions are left to the model, as it counts
                them itself: some do not count from 0.
            hidden_index: [N] flat positions in [R * L] of the hidden states that predict the wanted tokens.
            targets: [N] ids of those tokens.
            token_index: [N] their flat positions in [B * T].
            response_shape: (B, T).
            terms: a token-separable loss of the N tokens, to be computed in the same pass as log f_t, which then
                carries no gradient of its own.
            shared_row: what a row with shared prompts stands for.
            with_value: False where only log f is wanted; u is then 0.
        """
        if hidden_index is None:
            return self._own_logits(input_ids, position_ids)
        options = {"output_router_logits": True} if self.balances_experts else {}
        if shared_row is not None:
            options["shared_row"] = shared_row
            attention_mask = refuse_other_attention(input_ids)
        if shared_row is not None or attention_mask is None:
            options["position_ids"] = position_ids
        options.update(only_accepted(self._backbone[0], use_cache=False))
        output = self._backbone[0](input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = output.last_hidden_state
        aux_loss = self._balancing_loss(output, attention_mask) if self.balances_experts else hidden.new_zeros(())
        hidden = hidden.flatten(0, 1).index_select(0, hidden_index)

        def spread(values: torch.Tensor) -> torch.Tensor:
            zeros = values.new_zeros(response_shape[0] * response_shape[1])
            return zeros.index_copy(0, token_index, values).view(response_shape)

        u = self._value_logits(hidden) if with_value else torch.zeros(hidden.shape[:1], device=hidden.device)
        if terms is None:
            return PolicyOutput(spread(self._output_head[0](hidden, targets)), spread(u), aux_loss)
        log_f, loss = self._output_head[0](hidden, targets, u, terms)
        if u.requires_grad:
            # The same loss again with log f fixed: its value cancels, its gradient reaches the value head.
            through_u = terms.loss(log_f, u)
            loss = loss + (through_u - through_u.detach())
        return PolicyOutput(spread(log_f), spread(u.detach()), aux_loss, loss)

    def _own_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        given = {} if position_ids is None else {"position_ids": position_ids}
        options = only_accepted(self.causal_lm, use_cache=False)
        return self.lm(input_ids=input_ids, **given, **options).logits

    def _value_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.value_head is not None:
            return self.value_head(hidden)
        g = self.fixed_value
        return torch.full(hidden.shape[:1], math.log(g) - math.log1p(-g), device=hidden.device)

    def _balancing_loss(self, output, attention_mask: torch.Tensor | None) -> torch.Tensor:
        config = self._backbone[0].config
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        return load_balancing_loss_func(output.router_logits, experts, config.num_experts_per_tok, attention_mask)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict) -> None:
        """Recompute the backbone's activations in the backward pass; Actor calls this."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        if not gradient_checkpointing_kwargs["use_reentrant"]:
            # transformers makes the embeddings' output require a gradient; only reentrant checkpoints need one there.
            self.causal_lm.disable_input_require_grads()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The language model without PEFT's wrapper."""
        return self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm


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

    def forward(self, batch: Batch, terms: TokenTerms | None = None, with_value: bool = True) -> PolicyOutput:
        """The policy's output on ``batch``; see :meth:`Policy.forward`."""
        return self.model(
            batch.input_ids,
            batch.attention_mask,
            batch.position_ids,
            batch.hidden_index,
            batch.targets,
            batch.token_index,
            tuple(batch.labels.shape),
            terms,
            batch.shared_row,
            with_value,
        )


def add_lora(lm: PreTrainedModel, rank: int, alpha: int, target_modules: str | list[str], dropout: float) -> PeftModel:
    """LoRA as OpenRLHF attaches it.

    Raises:
        UserError: the target modules do not exist, or include the output head.
    """
    if target_modules == ["all-linear"]:  # as a command line gives it
        target_modules = "all-linear"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        lora_dropout=dropout,
        bias="none",
    )
    try:
        # DeepSpeed keeps float32 masters itself, and ZeRO-3 needs all parameters of one dtype.
        model = get_peft_model(lm, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"--ds.lora.target_modules: {str(error).splitlines()[0]}") from error
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise UserError("--ds.lora.target_modules: LoRA on the output head is not supported; leave it out")
    return model
