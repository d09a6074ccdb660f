"""Models of 7B on the meta device, where tensors have a shape and no values: our step, and stand-ins for kernels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.samples import Sample, as_samples
from pipa_openrlhf.model.policy import Policy, PolicyActor, ValueHead, add_lora
from pipa_openrlhf.objectives.batch_loss import BatchLoss, count_batch
from pipa_openrlhf.objectives.pipa import pipa_m

RANK = 64  # of LoRA
MODELS = {
    "DeepSeek-Math-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=30,
        num_attention_heads=32,
        vocab_size=102400,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-Math-7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
}


def language_model(config: PretrainedConfig, attention: str, rank: int = RANK) -> nn.Module:
    """In bf16, with LoRA on all linear layers unless ``rank`` is 0."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        lm = add_lora(lm, rank, rank, "all-linear", 0.0) if rank else lm
    # As DeepSpeed does: PEFT makes adapters in float32.
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return lm


def our_actor(config: PretrainedConfig, attention: str, checkpointing: bool) -> PolicyActor:
    """Our policy in bf16, with LoRA on all linear layers and a value head."""
    with torch.device("meta"):
        head = ValueHead(config.hidden_size, config.hidden_size, torch.bfloat16)
    actor = PolicyActor(Policy(language_model(config, attention), head)).train()
    if checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    return actor


def our_loss(actor: PolicyActor, sequences: int, length: int, prompt: int) -> Callable[[], torch.Tensor]:
    """A forward pass with PIPA-M's loss, on sequences of one length."""
    mask = None
    if actor.attention != ATTENTION:
        # With a mask of its own the model asks nothing about values, which a shape cannot answer.
        mask = torch.empty(sequences, 1, length - 1, length - 1, dtype=torch.bfloat16)
    batch_loss = BatchLoss(pipa_m())
    samples = [_sample(length, prompt, index) for index in range(sequences)]
    columns = ("loss_tokens", "right_tokens", "answer_label")
    counts = count_batch(*map(as_samples(samples).column, columns))
    batch = replace(collate(samples, None, 0, "padded"), attention_mask=mask).to(torch.device("meta"))

    def loss() -> torch.Tensor:
        output = actor(batch, batch_loss.token_terms(batch, counts))
        return batch_loss.share(output, batch, counts, torch.zeros((), device="meta"))

    return loss


def _sample(length: int, prompt: int, index: int) -> Sample:
    response = np.ones(length - prompt, dtype=np.int8)
    is_right = int(index % 2 == 0)
    ids, steps = np.zeros(length, dtype=np.int32), np.zeros(length - prompt, dtype=np.int32)
    return Sample(ids, prompt, response * np.int8(is_right), response, steps, is_right, "", None, "")


class CrossEntropy(torch.autograd.Function):
    """The tensors that flash-attn's cross-entropy kernel allocates."""

    @staticmethod
    def forward(ctx, logits, labels):
        losses, lse = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, lse, labels)
        return losses

    @staticmethod
    def backward(ctx, _):
        return torch.empty_like(ctx.saved_tensors[0]), None


class _FusedAttention(torch.autograd.Function):
    """The tensors that flash attention allocates: nothing of size length x length."""

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, length, _ = query.shape
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, _):
        query, key, value, _, _ = ctx.saved_tensors
        _accumulator = torch.empty_like(query, dtype=torch.float32)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module, query, key, value, attention_mask, **_options):
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


# sdpa has no fused kernel on the meta device: it would count length x length scores that no accelerator stores.
ATTENTION = "fused_shapes"
AttentionInterface.register(ATTENTION, _attention)
