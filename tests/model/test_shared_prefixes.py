"""Answers that share their prompt's tokens, against the same answers in rows of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import random_samples
from test_output_head import MODELS, VOCAB, make
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipa_openrlhf.data.batch import SharedRow, collate
from pipa_openrlhf.model import shared_prefixes
from pipa_openrlhf.model.policy import Policy, add_lora
from pipa_openrlhf.model.value_head import ValueHead

CANNOT = {"mistral-window", "gemma2-softcap"}  # sliding windows
LENGTHS = [(4, 7), (4, 1), (5, 4), (4, 11), (5, 9), (1, 3), (0, 6), (0, 2)]


def samples_of_three_prompts():
    """Three answers to one prompt, two to another, not side by side; one alone, and two without a prompt."""
    samples = random_samples(LENGTHS, VOCAB)
    for prompt_len, group in ((4, (0, 1, 3)), (5, (2, 4))):
        for index in group[1:]:
            samples[index].input_ids[:prompt_len] = samples[group[0]].input_ids[:prompt_len]
    samples[3].mask[2:5] = 0
    return samples


def policy_of(model) -> Policy:
    torch.manual_seed(1)
    head = ValueHead(16, 16, torch.float32)
    torch.nn.init.normal_(head.out.weight, std=0.5)
    return Policy(model, head)


def scalar_of(output) -> torch.Tensor:
    """A function of everything the policy gives that is no sum over equal weights."""
    weights = torch.linspace(0.5, 1.5, output.log_f.numel()).view_as(output.log_f)
    return (weights * (output.log_f + output.u.sin())).sum()


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_values_and_gradients_are_those_of_separate_rows(name):
    samples = samples_of_three_prompts()
    separate, shared = (collate(samples, None, 0, "shared" if share else "padded") for share in (False, True))
    results = []
    for batch in (separate, shared):
        policy = policy_of(make(name))
        assert policy.can_share_prefixes == (name not in CANNOT)
        if not policy.can_share_prefixes:
            return
        output = policy(batch)
        scalar_of(output).backward()
        results.append((output, {key: one.grad for key, one in policy.named_parameters()}))
    (alone, alone_grads), (together, together_grads) = results
    torch.testing.assert_close(together.log_f, alone.log_f, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(together.u, alone.u, rtol=1e-5, atol=2e-5)
    for key, grad in alone_grads.items():
        if grad is None:
            assert together_grads[key] is None or not together_grads[key].any(), key
        else:
            torch.testing.assert_close(together_grads[key], grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_shared_rows(reentrant):
    samples = samples_of_three_prompts()
    grads = []
    for share in (False, True):
        policy = policy_of(add_lora(make("qwen2"), 2, 4, "all-linear", 0.0))
        for key, one in policy.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(one, std=0.3)
        policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
        policy.train()
        scalar_of(policy(collate(samples, None, 0, "shared" if share else "padded"))).backward()
        grads.append({key: one.grad for key, one in policy.named_parameters() if one.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_reentrant_checkpoints_pay_for_gradients_of_the_embeddings(reentrant):
    policy = Policy(add_lora(make("llama"), 2, 4, "all-linear", 0.0))
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    embeddings = policy.lm.get_input_embeddings()(torch.tensor([[3]]))
    assert embeddings.requires_grad == reentrant


def test_an_answer_does_not_see_its_neighbours():
    samples = samples_of_three_prompts()
    policy = policy_of(make("llama"))
    before = policy(collate(samples, None, 0, "shared")).log_f
    changed = samples[0].input_ids.copy()
    changed[4:] = (changed[4:] + 1) % VOCAB
    samples[0] = replace(samples[0], input_ids=changed)
    after = policy(collate(samples, None, 0, "shared")).log_f
    assert (after[0] != before[0]).any()
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)


def test_a_row_holds_each_prompt_once():
    samples = samples_of_three_prompts()
    batch = collate(samples, None, 0, "shared")
    inputs = [sample.input_ids[:-1] for sample in samples]  # nothing is predicted from the last token
    assert batch.input_ids.shape == (1, sum(map(len, inputs)) - 4 - 4 - 5) and batch.attention_mask is None
    for ids, places in zip(inputs, batch.shared_row.sequence_index):
        held = places[: len(ids)]
        np.testing.assert_array_equal(batch.input_ids[0, held], ids)
        np.testing.assert_array_equal(batch.position_ids[0, held], np.arange(len(held)))


def test_nothing_is_padded_where_no_prompt_occurs_twice():
    samples = random_samples([(3, 7), (2, 1), (0, 4), (0, 4)], VOCAB)
    batch = collate(samples, None, 0, "shared")
    assert batch.input_ids.shape == (1, 9 + 2 + 3 + 3) and not batch.shared_row.repeats
    policy = policy_of(make("llama"))
    expected = policy(collate(samples, None, 0, "padded")).log_f
    torch.testing.assert_close(policy(batch).log_f, expected, rtol=1e-5, atol=1e-5)


def test_other_attention_stops_rather_than_giving_a_wrong_result(monkeypatch):
    policy = policy_of(make("llama"))
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"].args[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", plain)
    with pytest.raises(RuntimeError):
        policy(collate(samples_of_three_prompts(), None, 0, "shared"))


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
    sequence_index = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
    shared_row = SharedRow(sequence_index, torch.tensor([0, 1, 2, 3, 6, 7]), ((0, 2, 4),))
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
