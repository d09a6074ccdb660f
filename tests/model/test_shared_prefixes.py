"""Sequences that share every common prefix, against the same sequences in rows of their own."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefix_trees import branching_samples, priors
from test_output_head import MODELS, VOCAB, make, nll, pipa_n
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.prefixes import SharedRow
from pipa_openrlhf.model import output_head, shared_prefixes
from pipa_openrlhf.model.policy import Policy, ValueHead, add_lora
from pipa_openrlhf.objectives import pipa
from pipa_openrlhf.objectives.batch_loss import BatchLoss, PolicyOutput, count_batch

CANNOT = {"mistral-window", "gemma2-softcap"}  # sliding windows
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def wide_numbers(monkeypatch):
    """float64, also where a model's code asks for float32; several chunks of the output head, the last one partial."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 5 * VOCAB)


def policy_of(name: str, lora: bool = False) -> Policy:
    model = make(name).double()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # others have no float64
    torch.manual_seed(1)
    head = ValueHead(16, 16, torch.float64)
    torch.nn.init.normal_(head.out.weight, std=0.5)
    if lora:
        model = add_lora(model, 2, 4, "all-linear", 0.0)
        for key, one in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(one, std=0.3)
    return Policy(model, head)


def batch_of(samples, layout: str) -> Batch:
    return collate(samples, priors(samples), 0, layout)


def scalar_of(output: PolicyOutput) -> torch.Tensor:
    """A function of everything the policy gives that is no sum over equal weights."""
    weights = torch.linspace(0.5, 1.5, output.log_f.numel()).view_as(output.log_f)
    return (weights * (output.log_f + output.u.sin())).sum()


def gradients(policy: Policy) -> dict[str, torch.Tensor | None]:
    return {key: one.grad for key, one in policy.named_parameters() if one.requires_grad}


def assert_same(grads, expected) -> None:
    assert grads.keys() == expected.keys() and any(one is not None for one in expected.values())
    for key, grad in expected.items():
        if grad is None:
            assert grads[key] is None or not grads[key].any(), key
        else:
            torch.testing.assert_close(grads[key], grad, **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("copies", [1, 4], ids=["sequences", "trees"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_values_and_gradients_are_those_of_separate_rows(name, copies):
    samples = branching_samples(VOCAB) * copies
    assert (batch_of(samples, "shared").shared_row.trees is not None) == (copies > 1)
    results = []
    for layout in ("padded", "shared"):
        policy = policy_of(name)
        assert policy.can_share_prefixes == (name not in CANNOT)
        if not policy.can_share_prefixes:
            return
        output = policy(batch_of(samples, layout))
        scalar_of(output).backward()
        results.append((output, gradients(policy)))
    (alone, alone_grads), (together, together_grads) = results
    assert together.log_f.dtype == torch.float64
    torch.testing.assert_close(together.log_f, alone.log_f, **EXACT)
    torch.testing.assert_close(together.u, alone.u, **EXACT)
    assert_same(together_grads, alone_grads)


@pytest.mark.parametrize("copies", [1, 4], ids=["sequences", "trees"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_shared_rows(reentrant, copies):
    samples = branching_samples(VOCAB) * copies
    grads = []
    for layout in ("padded", "shared"):
        policy = policy_of("qwen2", lora=True)
        policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
        policy.train()
        scalar_of(policy(batch_of(samples, layout))).backward()
        grads.append(gradients(policy))
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("token_loss", [nll, pipa_n])
def test_the_loss_adds_up_over_what_differs_by_sample(token_loss, lora):
    """Labels, weights and priors of tokens that share a score differ: in one pass over the head and in two, the loss
    and its gradient are those of separate rows."""
    samples = branching_samples(VOCAB)
    objective = replace(pipa.pipa_n(), token_loss=token_loss, sft_coef=0.3, reduction="sequence_mean")
    columns = ([one.mask.sum(), (one.mask * one.labels).sum(), one.answer_label] for one in samples)
    counts = count_batch(*map(np.array, zip(*columns)))
    results = []
    for layout, fused in (("padded", False), ("shared", False), ("shared", True)):
        policy, batch, batch_loss = policy_of("llama", lora), batch_of(samples, layout), BatchLoss(objective)
        output = policy(batch, batch_loss.token_terms(batch, counts) if fused else None)
        assert (output.loss is not None) == fused
        loss = batch_loss.share(output, batch, counts, torch.zeros(()))
        loss.backward()
        results.append((loss.detach(), output.log_f.detach(), output.u.detach(), gradients(policy)))
    for *values, grads in results[1:]:
        for value, expected in zip(values, results[0]):
            torch.testing.assert_close(value, expected, **EXACT)
        assert_same(grads, results[0][-1])


def test_heads_run_once_a_distinct_hidden_state_and_target(monkeypatch):
    samples = branching_samples(VOCAB)
    batch = batch_of(samples, "shared")
    policy, rows = policy_of("llama"), []
    forward = policy.value_head.forward
    monkeypatch.setattr(policy.value_head, "forward", lambda hidden: rows.append(len(hidden)) or forward(hidden))
    log_probs = output_head._log_probs

    def counted(logits_of, hidden, targets):
        rows.append(len(hidden))
        return log_probs(logits_of, hidden, targets)

    monkeypatch.setattr(output_head, "_log_probs", counted)
    policy(batch)
    asked = {
        (*one.input_ids[: one.prompt_len + n], int(one.input_ids[one.prompt_len + n]))
        for one in samples
        for n in one.mask.nonzero()[0]
    }
    assert rows[0] == sum(rows[1:]) == len(asked) < sum(int(one.mask.sum()) for one in samples)


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_reentrant_checkpoints_pay_for_gradients_of_the_embeddings(reentrant):
    policy = Policy(add_lora(make("llama"), 2, 4, "all-linear", 0.0))
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    embeddings = policy.lm.get_input_embeddings()(torch.tensor([[3]]))
    assert embeddings.requires_grad == reentrant


def test_an_answer_does_not_see_its_neighbours():
    samples = branching_samples(VOCAB)
    policy = policy_of("llama")
    before = policy(batch_of(samples, "shared")).log_f
    changed = samples[2].input_ids.copy()
    changed[9:] = (changed[9:] + 1) % VOCAB  # its own, after what it shares
    samples[2] = replace(samples[2], input_ids=changed)
    after = policy(batch_of(samples, "shared")).log_f
    assert (after[2] != before[2]).any()
    others = [number for number in range(len(samples)) if number != 2]
    torch.testing.assert_close(after[others], before[others], **EXACT)


def test_other_attention_stops_rather_than_giving_a_wrong_result(monkeypatch):
    policy = policy_of("llama")
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"].args[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", plain)
    with pytest.raises(RuntimeError):
        policy(batch_of(branching_samples(VOCAB), "shared"))


def test_eager_attention_cannot_share():
    model = make("llama")
    model.set_attn_implementation("eager")
    assert not Policy(model).can_share_prefixes


def test_a_kernel_gets_plain_causal_sequences(monkeypatch):
    """Flash attention, which this machine may lack, must see neither mask nor positions."""
    calls = []

    def kernel(module, query, key, value, attention_mask, **options):
        calls.append((query.shape, attention_mask, options["position_ids"]))
        return query.transpose(1, 2), None

    tokens = torch.arange(12.0).view(1, 1, 6, 2)
    block_index = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
    shared_row = SharedRow(block_index, torch.tensor([0, 1, 2, 3, 6, 7]), ((0, 2, 4),))
    output, _ = shared_prefixes.attend(
        kernel,
        None,
        tokens,
        tokens,
        tokens,
        None,
        shared_row=shared_row,
        position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]]),
    )
    assert calls == [((2, 1, 4, 2), None, None)]
    torch.testing.assert_close(output, tokens.transpose(1, 2))


def trees_and_sequences(kernel, dtype, **inputs):
    """Outputs and gradients of :func:`attend` over the same row in trees and in sequences."""
    shared_row = batch_of(branching_samples(VOCAB) * 4, "shared").shared_row
    size = len(shared_row.row_index)
    torch.manual_seed(0)
    row = torch.randn(3, 1, 4, size, 8).to(dtype)
    results = []
    for takes_mask in (True, False):
        query, key, value = (one.clone().requires_grad_() for one in (row[0], row[1][:, :2], row[2][:, :2]))
        module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
        output, _ = shared_prefixes.attend(
            kernel, module, query, key, value, None, shared_row=shared_row, takes_mask=takes_mask, **inputs
        )
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output.detach(), query.grad, key.grad, value.grad))
    return results


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_tree_attends_like_its_sequences(scaling):
    for one, other in zip(*trees_and_sequences(sdpa_attention_forward, torch.float64, scaling=scaling)):
        torch.testing.assert_close(one, other, **EXACT)


def plain_varlen(query, key, value, query_ends, key_ends, most_queries, most_keys, scaling):
    """Query by query, what a kernel for sequences of any length computes."""
    rows, heads = [], query.shape[1] // key.shape[1]
    for (first, end), (key_first, key_end) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist())):
        assert end - first <= most_queries and key_end - key_first <= most_keys
        for number in range(first, end):
            seen = slice(key_first, key_end - (end - 1 - number))
            keys, values = (one[seen].repeat_interleave(heads, 1) for one in (key, value))
            scores = torch.einsum("hd,khd->hk", query[number], keys)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            rows.append(torch.einsum("hk,khd->hd", (scores * scale).softmax(-1), values))
    return torch.stack(rows)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_kernel_for_any_length_attends_like_one_for_padded_sequences(monkeypatch, scaling):
    (alone, _) = trees_and_sequences(sdpa_attention_forward, torch.float64, scaling=scaling)
    monkeypatch.setattr(shared_prefixes, "_varlen_kernel", lambda *_: plain_varlen)
    for results in trees_and_sequences(None, torch.float64, scaling=scaling):
        for one, other in zip(results, alone):
            torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_the_policy_is_the_same_with_a_kernel_for_any_length(monkeypatch, name):
    samples, results = branching_samples(VOCAB), []
    for kernel in (None, plain_varlen):
        monkeypatch.setattr(shared_prefixes, "_varlen_kernel", lambda *_, kernel=kernel: kernel)
        policy = policy_of(name, lora=True)
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        output = policy(batch_of(samples, "shared"))
        scalar_of(output).backward()
        results.append((output.log_f, gradients(policy)))
    torch.testing.assert_close(results[1][0], results[0][0], **EXACT)
    assert_same(results[1][1], results[0][1])


def test_a_cpu_has_no_kernel_for_any_length():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    for kernel in ("sdpa", "flash_attention_2"):
        assert shared_prefixes._varlen_kernel(kernel, query, query, query, {}) is None


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_short_attention_in_bf16_is_that_of_the_kernel_but_for_rounding(monkeypatch, scaling):
    calls = []
    short = shared_prefixes._attend_short
    monkeypatch.setattr(
        shared_prefixes, "_attend_short", lambda *args, **more: calls.append(1) or short(*args, **more)
    )
    inputs = {"dtype": torch.bfloat16, "scaling": scaling}
    for one, other in zip(*trees_and_sequences(sdpa_attention_forward, **inputs)):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert len(calls) == 1, "trees are short, and sequences of a kernel without masks are the kernel's"
    for more in ({"dropout": 1e-9}, {"position_bias": torch.zeros(())}, {"is_causal": False}):
        trees_and_sequences(lambda _, query, *rest, **options: (query.transpose(1, 2), None), **inputs, **more)
        assert len(calls) == 1, f"{more} is the kernel's"


def test_short_attention_is_causal_without_a_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    output, _ = shared_prefixes._attend_short(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(output, expected, **EXACT)
