"""The self-check sees a fault planted in each layout, in the attention, in the logits, in the cache and in lengths."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_every_architecture import actor_of, run_flags, samples_of_a_run
from test_output_head import make
from tiny import logged_lines, make_model, run_in_process, train

from pipa_openrlhf.data import prefixes
from pipa_openrlhf.data.prefixes import common_prefix
from pipa_openrlhf.data.samples import as_samples
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model import output_head, policy, self_check
from pipa_openrlhf.model.self_check import check_cached, choose_layout, difference, probe_samples
from pipa_openrlhf.prior.cache import PriorCache

VOCAB = 97


def choose(model, shared=True, packed=True, samples=None, dtype=torch.float32):
    """The actor with its layout, and the lines said."""
    strategy = SimpleNamespace(all_reduce=lambda tensor, op: tensor)
    actor = actor_of(model.to(dtype))
    with logged_lines() as lines:
        choose_layout(run_flags(shared, packed), actor, as_samples(samples or samples_of_a_run(0)), strategy, 0)
    return actor, lines


@pytest.fixture
def faulty_when(monkeypatch):
    """``faulty_when(condition)``: the backbone gives other hidden states to batches for which it holds."""
    forward = policy.Policy.forward

    def plant(condition):
        def faulty(self, batch, *rest, own=False, **options):
            output = forward(self, batch, *rest, own=own, **options)
            if own or not condition(self, batch):
                return output
            return output._replace(log_f=output.log_f + 0.01 * (output.log_f != 0))

        monkeypatch.setattr(policy.Policy, "forward", faulty)

    return plant


def in_one_row(policy, batch):
    return batch.attention_mask is None and batch.shared_row is None


def shares(policy, batch):
    return batch.shared_row is not None


def padded(policy, batch):
    return batch.attention_mask is not None


def recomputes(policy, *_):
    return any(one.training for one in policy.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "cohere", "phi-bias"])
def test_exact_layouts_are_used(name, dtype):
    for layout, flags in {"shared": (True, True), "packed": (False, True), "padded": (False, False)}.items():
        actor, lines = choose(make(name), *flags, dtype=dtype)
        assert (actor.layout, lines) == (layout, [])
        assert 0 < actor.tolerance < (1e-4 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize(
    "fault, asked, used",
    [(shares, (True, True), "packed"), (shares, (True, False), "padded"), (in_one_row, (False, True), "padded")],
)
def test_a_faulty_layout_is_left_for_an_exact_one(faulty_when, fault, asked, used):
    faulty_when(fault)
    actor, lines = choose(make("llama"), *asked)
    flag = "--train.share_prefixes" if fault is shares else "--ds.packing_samples"
    assert actor.layout == used
    assert len(lines) == 1 and flag in lines[0] and "0.01 nats" in lines[0]


@pytest.mark.parametrize("fault", [padded, recomputes])
def test_without_an_exact_layout_nothing_is_trained(faulty_when, fault):
    faulty_when(fault)
    with pytest.raises(UserError, match="LlamaForCausalLM.*0.01 nats") as error:
        choose(make("llama"), False, False)
    assert "\n" not in str(error.value)


def test_trees_with_a_wrong_mask_are_seen(monkeypatch):
    in_trees = prefixes._in_trees

    def with_all_visible(*args):
        row = in_trees(*args)
        return replace(row, block_ends=torch.full_like(row.block_ends, row.block_ends.shape[1]))

    monkeypatch.setattr(prefixes, "_in_trees", with_all_visible)
    actor, lines = choose(make("llama"))
    assert actor.layout == "packed" and len(lines) == 1 and "--train.share_prefixes" in lines[0]


def test_wrong_logits_are_seen(monkeypatch):
    tail = output_head.tail_of
    monkeypatch.setattr(output_head, "tail_of", lambda *words: lambda hidden: 1.05 * tail(*words)(hidden))
    with pytest.raises(UserError, match="not the model's own"):
        choose(make("granite"), False, False)


def test_attention_that_drops_the_marks_of_a_shared_row_does_not_share():
    config = transformers.NemotronConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    actor, lines = choose(transformers.NemotronForCausalLM(config))
    assert actor.layout == "packed" and len(lines) == 1 and "--train.share_prefixes" in lines[0]


@pytest.mark.skipif(
    not transformers.Gemma2ForCausalLM._supports_sdpa, reason="newer transformers know that sdpa has no soft cap"
)
def test_sdpa_without_a_soft_cap_gives_way_to_eager():
    model = make("gemma2-softcap")
    model.config.attn_logit_softcapping = 0.5
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    assert model.config._attn_implementation == "sdpa"
    actor, lines = choose(model, True, False)
    assert model.config._attn_implementation == "eager" and "sdpa attention" in lines[0]
    assert actor.layout == "padded"


def test_eager_attention_that_forgets_the_causal_mask_is_no_measure(monkeypatch):
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama,
        "eager_attention_forward",
        lambda module, query, key, value, mask, **options: eager(module, query, key, value, None, **options),
    )
    actor, lines = choose(make("llama"), True, False)
    assert (actor.layout, lines, actor.model.causal_lm.config._attn_implementation) == ("shared", [], "sdpa")


def test_a_model_that_sees_the_future_is_refused():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        is_decoder=False,
    )
    with pytest.raises(UserError, match="not the model's own"):
        choose(transformers.BertLMHeadModel(config).eval(), False, False)


@pytest.mark.parametrize("damage", [None, 0.01])
def test_cached_entries_are_computed_again(tmp_path, damage):
    samples = samples_of_a_run(0)
    actor, _ = choose(make("llama"), samples=samples)
    own = [row.numpy() for row in self_check.own_log_probs(actor.model, samples)]
    cache = PriorCache(str(tmp_path), "0" * 64, "fp32")
    cache.add(samples[:5], [row + (damage or 0) for row in own[:5]])
    strategy = SimpleNamespace(all_reduce=lambda tensor, op: tensor)
    samples = as_samples(samples)
    absent = cache.missing(samples)
    assert absent.tolist() == [False] * 5 + [True]
    if damage is None:
        check_cached(actor, cache, samples, absent, strategy)
        check_cached(actor, cache, samples[5:], np.array([True]), strategy)
    else:
        with pytest.raises(UserError, match=f"{tmp_path}.*0.01 nats"):
            check_cached(actor, cache, samples, absent, strategy)


def test_sequences_longer_than_the_table_of_positions_are_refused():
    samples = samples_of_a_run(0)
    longest = max(len(one.input_ids) for one in samples)
    config = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)
    for positions in (longest, longest - 1):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=positions, **config)).eval()
        if positions == longest:
            assert choose(model, True, False)[0].layout == "shared"
        else:
            with pytest.raises(UserError, match=f"a sequence of {longest} tokens.*--data.max_len {positions}"):
                choose(model, True, False)


def test_an_offset_of_the_table_of_positions_counts():
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=60,
    )
    with pytest.raises(UserError, match="--data.max_len 60"):
        choose(transformers.OPTForCausalLM(config).eval(), False, False)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_stretch_with_the_longest_sequence_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 50}
    if kind == "longrope":
        rope.update(short_factor=[1.0] * 4, long_factor=[3.0] * 4)
    model = make_model(
        0, VOCAB, pad_token_id=0, max_position_embeddings=50 if kind == "dynamic" else 200, rope_parameters=rope
    )
    with pytest.raises(UserError, match="--data.max_len 50"):
        choose(model, False, False)
    short = [one for one in samples_of_a_run(0) if len(one.input_ids) <= 50]
    assert choose(model, False, False, samples=short)[0].layout == "padded"


def test_rotary_positions_beyond_the_declared_length_deserve_a_line():
    _, lines = choose(make_model(0, VOCAB, pad_token_id=0, max_position_embeddings=40), True, False)
    assert len(lines) == 1 and "made for 40" in lines[0]


def test_probes_are_a_tree_whatever_the_data_share():
    """Two branches, one from the other, so that a wrong sum over either is seen; the second probe is on its own."""
    for samples in (samples_of_a_run(0), samples_of_a_run(0)[2:4], samples_of_a_run(0)[:1]):
        first, second, third, fourth = (probe.input_ids for probe in probe_samples(as_samples(samples)))
        size = probe_samples(as_samples(samples))[0].prompt_len
        assert common_prefix(first, third) >= size + 6 and common_prefix(third, fourth) >= size + 12
        assert len(first) != len(second)
        for probe in probe_samples(as_samples(samples)):
            assert 1 < len(probe.input_ids) <= 48 and len(probe.labels) == len(probe.input_ids) - probe.prompt_len


def test_differences_that_are_not_numbers_are_differences():
    rows = [torch.zeros(3), torch.tensor([0.0, float("nan")])]
    assert difference(rows, [torch.zeros(3), torch.zeros(2)]) == float("inf")


def test_the_flag_turns_it_off(small_run, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(self_check, "own_log_probs", lambda *words: calls.append(1) or 1 / 0)
    train("train_pipa", *small_run("out", **{"model.self_check": "false", "train.max_epochs": 1}))
    assert not calls


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_says_what_it_does_not_use(small_run, faulty_when, capsys, stage):
    faulty_when(shares)
    assert run_in_process("train_pipa", *small_run("out", **{"ds.zero_stage": stage, "train.max_epochs": 1})) == 0
    assert "--train.share_prefixes: log-probs are not the model's own" in capsys.readouterr().out
