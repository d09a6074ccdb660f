"""One training step of ours and of OpenRLHF's DPO on the meta device: real code, shapes only, every byte counted."""

import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from live_bytes import LiveBytes, storages_of
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.distributed.upstream import Actor
from pipa_openrlhf.losses.objectives import objectives
from pipa_openrlhf.losses.reduction import count_batch
from pipa_openrlhf.models.policy import Policy, PolicyActor, add_lora
from pipa_openrlhf.models.value_head import ValueHead
from pipa_openrlhf.trainer.batch_loss import BatchLoss, LossSettings

# isort: split
# OpenRLHF's trainers import flash-attn where ours has not put its stand-in first.
from openrlhf.models.loss import DPOLoss
from openrlhf.trainer.dpo_trainer import DPOTrainer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Step:
    """What is trained, and on what.

    Attributes:
        sequences: of one forward pass; for DPO that many halves of pairs.
        prompt_share: part of a sequence that is prompt.
        lora_rank: 0 for full fine-tuning.
    """

    config: PretrainedConfig
    dtype: str = "bf16"
    sequences: int = 1
    length: int = 2048
    prompt_share: float = 0.25
    lora_rank: int = 64
    checkpointing: bool = True


@dataclass(frozen=True)
class StepBytes:
    """What a forward and backward pass takes beside weights, gradients and optimizer.

    Attributes:
        kept: for the backward pass, at the end of the forward pass.
        before_gradients: peak up to the first gradient of a parameter.
        after_gradients: peak from there on, gradients not counted.
        largest: the largest tensors at the overall peak.
        frozen, trained: parameters of the model that is trained.
        other: parameters of a second model.
    """

    kept: int
    before_gradients: int
    after_gradients: int
    largest: list[dict]
    frozen: int
    trained: int
    other: int = 0


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more):
    """A Llama's config."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        **more,
    )


def deepseek_math_7b() -> PretrainedConfig:
    """Shape of DeepSeek-Math-7B."""
    return llama(4096, 11008, 30, 32, 32, 102400, tie_word_embeddings=False)


def qwen_math_7b() -> PretrainedConfig:
    """Shape of Qwen2.5-Math-7B."""
    return Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def our_step(step: Step) -> StepBytes:
    """PIPA-M through our policy: the trainer's own calls between two optimizer updates."""
    batch_loss = BatchLoss(objectives()["pipa_m"], LossSettings())
    actor = our_actor(step, "meta", _ATTENTION)
    samples = _samples(step)
    counts = count_batch([(one.labels, one.mask, one.answer_label) for one in samples])
    # All sequences are of one length, so there is no padding to mask.
    batch = replace(collate(samples, None, 0, "padded"), attention_mask=None).to(torch.device("meta"))

    def loss() -> torch.Tensor:
        terms = batch_loss.token_terms(batch, counts)
        return batch_loss.share(actor(batch, terms), batch, counts, torch.zeros((), device="meta"))

    return _count(loss, actor.train())


def our_actor(step: Step, device: str, attention: str = "sdpa") -> PolicyActor:
    """Our policy with random weights, LoRA where the step has it, and a value head."""
    with torch.device(device):
        lm = _language_model(step, attention)
        if step.lora_rank:
            lm = add_lora(lm, step.lora_rank, 16, "all-linear", 0.0)
        width = step.config.hidden_size
        actor = PolicyActor(Policy(lm, ValueHead(width, width, DTYPES[step.dtype])))
    if step.checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    return _cast(actor, step)


def openrlhf_dpo_step(step: Step, flash_attn_loss: bool) -> StepBytes:
    """OpenRLHF's DPO through its own Actor and trainer.

    Args:
        flash_attn_loss: with flash-attn's cross-entropy kernel, as where flash-attn is installed.
    """
    with torch.device("meta"):
        lm = _language_model(step, _ATTENTION)
        if step.lora_rank:
            lm = add_lora(lm, step.lora_rank, 16, "all-linear", 0.0)
        actor, reference = _cast(_upstream_actor(lm), step), _upstream_actor(_language_model(step, _ATTENTION))
    if step.checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(ring_attn_group=None),
        tokenizer=SimpleNamespace(pad_token_id=0),
        concatenated_inputs=lambda *args: DPOTrainer.concatenated_inputs(trainer, *args),
        _get_batch_logps=lambda *args: DPOTrainer._get_batch_logps(trainer, *args),
    )
    pairs = step.sequences // 2
    ids = torch.zeros(pairs, step.length, dtype=torch.long, device="meta")
    inputs = (ids, torch.ones_like(ids), ids, torch.ones_like(ids), [int(step.length * step.prompt_share)] * pairs)

    def loss() -> torch.Tensor:
        chosen, rejected, _, _ = DPOTrainer.concatenated_forward(trainer, actor, *inputs)
        with torch.no_grad():
            of_reference = DPOTrainer.concatenated_forward(trainer, reference, *inputs)
        return DPOLoss(0.1)(chosen, rejected, *of_reference[:2])[0]

    with _flash_attn_cross_entropy(flash_attn_loss):
        return _count(loss, actor.train(), reference.eval())


def _count(make_loss: Callable[[], torch.Tensor], actor: nn.Module, other: nn.Module | None = None) -> StepBytes:
    trained = [one for one in actor.parameters() if one.requires_grad]
    first_gradient = []

    with LiveBytes(storages_of(actor, *([other] if other else []))) as live:

        def on_gradient(parameter: torch.Tensor) -> None:
            # DeepSpeed moves a gradient away as soon as it is there; the states count it.
            parameter.grad = None
            if not first_gradient:
                first_gradient.append((live.peak, live.top(8)))
                live.restart_peak()

        hooks = [one.register_post_accumulate_grad_hook(on_gradient) for one in trained]
        loss = make_loss()
        kept = live.live
        loss.backward()
        for hook in hooks:
            hook.remove()
        (before, largest), after = first_gradient[0], live.peak
        frozen = sum(one.numel() for one in actor.parameters()) - sum(one.numel() for one in trained)
        return StepBytes(
            kept=kept,
            before_gradients=before,
            after_gradients=after,
            largest=largest if before > after else live.top(8),
            frozen=frozen,
            trained=sum(one.numel() for one in trained),
            other=sum(one.numel() for one in other.parameters()) if other else 0,
        )


def _language_model(step: Step, attention: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(step.config, dtype=DTYPES[step.dtype], attn_implementation=attention)


def _cast(actor: Actor, step: Step) -> Actor:
    # As DeepSpeed does: PEFT makes adapters in float32.
    for parameter in actor.parameters():
        parameter.data = parameter.data.to(DTYPES[step.dtype])
    return actor


def _upstream_actor(lm: nn.Module) -> Actor:
    # Its constructor sets both only where it loads the weights itself.
    lm.config.use_cache = False
    actor = Actor(lm)
    actor.packing_samples = False
    return actor


def _samples(step: Step) -> list[Sample]:
    prompt = int(step.length * step.prompt_share)
    response = np.ones(step.length - prompt, dtype=np.int8)
    return [
        Sample(
            input_ids=np.zeros(step.length, dtype=np.int32),
            prompt_len=prompt,
            labels=response * (index % 2 == 0),
            mask=response,
            step_ids=np.zeros(len(response), dtype=np.int32),
            answer_label=int(index % 2 == 0),
            problem_id=str(index // 2),
            pair_id=index // 2,
            where="",
        )
        for index in range(step.sequences)
    ]


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
_ATTENTION = "fused_shapes"
AttentionInterface.register(_ATTENTION, _attention)


class _CrossEntropy(torch.autograd.Function):
    """The tensors that flash-attn's cross-entropy kernel allocates."""

    @staticmethod
    def forward(ctx, logits, labels):
        losses, lse = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, lse, labels)
        return losses

    @staticmethod
    def backward(ctx, _):
        return torch.empty_like(ctx.saved_tensors[0]), None


@contextmanager
def _flash_attn_cross_entropy(present: bool):
    name = "flash_attn.ops.triton.cross_entropy"
    stand_in = types.ModuleType(name)
    stand_in.cross_entropy_loss = lambda logits, labels: (_CrossEntropy.apply(logits, labels), None)
    before = sys.modules.get(name)
    # OpenRLHF takes its own fallback where the import fails, as it does for an entry of None.
    sys.modules[name] = stand_in if present else None
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
