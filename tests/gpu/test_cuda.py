"""What only CUDA shows: chunks and passes by free memory, copies ahead, kernels for any length, fused updates."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from prefix_trees import branching_samples, priors
from samples import random_samples
from tiny import make_model, read_jsonl, run_module, train
from transformers import LlamaConfig, LlamaForCausalLM

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.distributed.strategy import device, free_memory
from pipa_openrlhf.distributed.transfer import on_device
from pipa_openrlhf.model import output_head, shared_prefixes
from pipa_openrlhf.model.policy import Policy, ValueHead
from pipa_openrlhf.objectives.batch_loss import TokenTerms
from pipa_openrlhf.objectives.sft import sft_token_loss
from pipa_openrlhf.prior import fill
from pipa_openrlhf.training.trainer import Callback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GIB = 2**30
VOCAB = 151_936


def test_free_memory_is_what_can_still_be_allocated():
    before = free_memory()
    taken = torch.empty(GIB, dtype=torch.uint8, device=device())
    with_it = free_memory()
    assert before - with_it == pytest.approx(GIB, rel=0.05)
    del taken  # the allocator keeps it for this process
    assert free_memory() == pytest.approx(before, rel=0.05)


def test_chunks_of_the_head_follow_free_memory_and_the_loss_does_not(monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape)).to(device())
    batch = collate(random_samples([(5, 400), (9, 900)], VOCAB), None, 0, "padded").to(device())
    zeros = torch.zeros(len(batch.targets), device=device())
    terms = TokenTerms(sft_token_loss, zeros, zeros, torch.full_like(zeros, 1 / len(zeros)), zeros)
    sizes, results = [], []
    chunk_tokens = output_head.chunk_tokens
    monkeypatch.setattr(output_head, "chunk_tokens", lambda *args: sizes.append(chunk_tokens(*args)) or sizes[-1])
    for free in (free_memory, lambda: None):
        monkeypatch.setattr(output_head, "free_memory", free)
        model.zero_grad()
        loss = Policy(model)(batch, terms).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad.clone(), model.model.norm.weight.grad.clone()))
    by_memory, as_on_cpu = sizes
    assert as_on_cpu == 220 < by_memory
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Item:
    values: torch.Tensor


def test_items_arrive_whole_while_the_device_is_busy():
    """Memory of an item is not handed to the next one while a slow stream of work still reads it."""
    sources = [torch.full((4_000_000,), float(number)) for number in range(24)]
    left = torch.randn(2048, 2048, device=device())
    sums = []
    for item in on_device(map(Item, sources)):
        assert item.values.device == device()
        for _ in range(20):
            left = torch.tanh(left @ left)
        sums.append(item.values.double().mean() + 0 * left[0, 0])
        del item
    assert [float(one) for one in sums] == list(map(float, range(24)))


@pytest.mark.parametrize("key_heads", [2, 4], ids=["grouped", "one key a query"])
def test_a_kernel_for_any_length_attends_like_padded_float32(key_heads):
    row = collate(branching_samples(97) * 4, None, 0, "shared").to(device()).shared_row
    size = len(row.row_index)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, size, 64, device=device()) for heads in (4, key_heads, key_heads)]
    inputs = [one.bfloat16() for one in inputs]
    if shared_prefixes._varlen_kernel("sdpa", *inputs, {}) is None:
        pytest.skip("this torch has no kernel for sequences of any length")
    inner = torch.nn.functional.scaled_dot_product_attention

    def padded(module, query, key, value, mask, **options):
        output = inner(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        return output.transpose(1, 2), None

    results = []
    for dtype, kernel in ((torch.float32, ""), (torch.bfloat16, "sdpa")):
        query, key, value = (one.to(dtype).requires_grad_() for one in inputs)
        output, _ = shared_prefixes.attend(padded, None, query, key, value, None, shared_row=row, kernel=kernel)
        (output.float() * torch.linspace(0, 1, output.numel(), device=device()).view_as(output)).sum().backward()
        results.append([one.float() for one in (output.detach(), query.grad, key.grad, value.grad)])
    for expected, found in zip(*results):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_agree(dtype):
    samples = branching_samples(258)
    model = make_model(0, num_attention_heads=2, num_key_value_heads=1, hidden_size=32).to(device(), dtype)
    head = ValueHead(32, 32, dtype).to(device())
    torch.nn.init.normal_(head.out.weight, std=0.5)
    policy = Policy(model, head)
    outputs = {}
    for layout in ("padded", "packed", "shared"):
        with torch.no_grad():
            output = policy(collate(samples, priors(samples), 0, layout).to(device()))
        outputs[layout] = torch.stack((output.log_f, output.u)).float()
    for layout in ("packed", "shared"):
        error = (outputs[layout] - outputs["padded"]).norm() / outputs["padded"].norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.03), layout


def test_the_prior_pass_takes_more_answers_than_a_micro_batch(small_run, monkeypatch):
    sizes = []
    collate_passes = fill.collate

    def counted(samples, *args, **options):
        sizes.append(len(samples))
        return collate_passes(samples, *args, **options)

    monkeypatch.setattr(fill, "collate", counted)
    words = {"train.micro_batch_size": 1, "prior.model_name_or_path": None, "train.max_epochs": 1}
    train("train_pipa", *small_run("out", **words))
    assert len(sizes) == 1 < sizes[0]


class Optimizers(Callback):
    def on_train_begin(self, trainer) -> None:
        optimizer = trainer.actor.model.optimizer
        self.found = getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize("stage, offload", [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)])
def test_every_stage_trains_in_bf16_with_torchs_fused_adamw(small_run, stage, offload):
    seen = Optimizers()
    changes = {"ds.param_dtype": "bf16", "ds.zero_stage": stage, "ds.adam_offload": offload, "ds.lora.rank": 4}
    rows = train("train_pipa", *small_run("out", **changes), callbacks=[seen])
    assert type(seen.found) is torch.optim.AdamW and all(group["fused"] for group in seen.found.param_groups)
    assert len(rows) == 6 and all(np.isfinite(row["loss"]) and row["bad_steps"] == 0 for row in rows)


def test_losses_are_those_of_a_cpu(small_run, tmp_path, monkeypatch):
    rows = train("train_pipa", *small_run("cuda", **{"ckpt.save_steps": None}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = run_module(
        "train_pipa", *small_run("cpu", **{"ckpt.save_steps": None, "prior.cache_dir": tmp_path / "own"})
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = read_jsonl(tmp_path / "cpu" / "metrics.jsonl")
    assert [row["loss"] for row in rows[:5]] == pytest.approx([row["loss"] for row in expected[:5]], rel=1e-4)
