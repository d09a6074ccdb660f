"""Merging an adapter, whatever it touches, gives the model that PEFT computes; saved and loaded, too."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_model, make_tokenizer, save_adapter, train
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipa_openrlhf import config
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model import adapters
from pipa_openrlhf.model.loading import load_causal_lm

IDS = torch.tensor([[5, 9, 70, 8]])
MORE_TOKENS = 261
TOUCHES = {
    "attention": {"target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "both tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 70]},
}


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.eval()(IDS).logits.float(), -1)


def save_trained_adapter(base_folder, folder, rows: int | None = None, **config) -> torch.Tensor:
    """Log-probs of a model whose adapter, written to ``folder``, has random values in every trained tensor."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    if rows is not None:
        base.resize_token_embeddings(rows)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return log_probs(model)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_folder(request, tmp_path):
    make_model(0, tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("touches", TOUCHES)
def test_merged_model_is_the_adapted_one(base_folder, tmp_path, touches):
    adapted = save_trained_adapter(base_folder, tmp_path / "adapter", **TOUCHES[touches])
    assert (adapted - log_probs(load_causal_lm(str(base_folder), torch.float32, "sdpa"))).abs().max() > 0.1
    merged = load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa")
    torch.testing.assert_close(log_probs(merged), adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(log_probs(again), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]])
def test_vocabulary_of_the_adapter(base_folder, tmp_path, saved):
    """Rows that were added before training come with the adapter; data may use them."""
    adapted = save_trained_adapter(
        base_folder, tmp_path / "adapter", MORE_TOKENS, target_modules=["q_proj"], modules_to_save=saved
    )
    merged = load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa")
    assert merged.config.vocab_size == MORE_TOKENS
    torch.testing.assert_close(log_probs(merged), adapted, rtol=1e-4, atol=1e-4)


def test_adapter_of_another_size_is_refused_by_its_sizes(tiny_models, tmp_path):
    make_model(0, hidden_size=32).save_pretrained(tmp_path / "wide")
    save_trained_adapter(tmp_path / "wide", tmp_path / "adapter", target_modules=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    record = {**json.loads(config.read_text()), "base_model_name_or_path": str(tiny_models / "policy")}
    config.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"adapter.*size mismatch.*\[2, 32\].*\[2, 16\]") as error:
        load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_that_changes_the_model_is_refused(tmp_path, monkeypatch, dtype):
    make_model(0, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    save_trained_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["embed_tokens"])
    monkeypatch.setattr(adapters, "_untie_adapted_embeddings", lambda lm: None)
    with pytest.raises(UserError, match="adapter: merging the adapter changes log-probs by up to"):
        load_causal_lm(str(tmp_path / "adapter"), dtype, "sdpa")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_no_other_model(tiny_models, tmp_path, dtype):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    assert load_causal_lm(str(tmp_path / "adapter"), dtype, "sdpa").dtype == dtype


@pytest.mark.parametrize("allowed, merges", [(0.0, False), (adapters._MERGE_TOLERANCE, True)])
def test_what_rounding_explains_is_measured(tmp_path, monkeypatch, allowed, merges):
    """In bf16 merging this model changes more than is let through unseen, and no more than its rounding does."""
    make_model(0, initializer_range=0.5, num_hidden_layers=6).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", 1)
    monkeypatch.setattr(adapters, "_MERGE_TOLERANCE", allowed)
    if merges:
        load_causal_lm(str(tmp_path / "adapter"), torch.bfloat16, "sdpa")
        return
    with pytest.raises(UserError, match="inf times what rounding explains"):
        load_causal_lm(str(tmp_path / "adapter"), torch.bfloat16, "sdpa")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("touches", TOUCHES)
def test_rounding_is_measured_whatever_an_adapter_touches(base_folder, tmp_path, monkeypatch, touches):
    save_trained_adapter(base_folder, tmp_path / "adapter", **TOUCHES[touches])
    monkeypatch.setattr(adapters, "_MERGE_CHANGE", 0.0)
    merged = load_causal_lm(str(tmp_path / "adapter"), torch.bfloat16, "sdpa")
    assert not any(module._forward_hooks for module in merged.modules())


def test_merged_model_is_trainable_where_its_base_is(tiny_models, tmp_path):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    merged = load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa")
    assert all(parameter.requires_grad for parameter in merged.parameters())
    # Positions that a model keeps fixed stay fixed.
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=9))
    base.transformer.wpe.weight.requires_grad_(False)
    PeftModel(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "gpt2")
    fresh = GPT2LMHeadModel(base.config)
    fresh.transformer.wpe.weight.requires_grad_(False)
    merged = adapters.merge_adapter(fresh, str(tmp_path / "gpt2"))
    assert [name for name, one in merged.named_parameters() if not one.requires_grad] == ["transformer.wpe.weight"]


@pytest.mark.filterwarnings("ignore")
def test_data_may_use_tokens_that_the_adapter_brings(small_run, tiny_models, tmp_path):
    make_model(0, vocab_size=200, eos_token_id=1, pad_token_id=1).save_pretrained(tmp_path / "small")
    save_trained_adapter(tmp_path / "small", tmp_path / "adapter", 258, target_modules=["q_proj"])
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    changes = {"model.model_name_or_path": tmp_path / "adapter", "ds.lora.rank": 2, "ckpt.save_steps": None}
    assert len(train("train_pipa", *small_run("out", **changes))) == 6


def test_a_base_that_was_moved_is_named(tmp_path):
    make_model(0).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", 1)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"^cannot load a model from {tmp_path / 'base'}: "):
        load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa")


@pytest.mark.parametrize("name", ["load_in_4bit", "use_liger_kernel"])
@pytest.mark.parametrize("place", ["model", "prior"])
def test_what_a_merged_adapter_cannot_have_is_refused_before_anything_is_read(
    base_folder, tmp_path, monkeypatch, name, place
):
    monkeypatch.setattr(config, "need_package", lambda flag, package: None)
    adapter = str(tmp_path / "adapter")
    save_adapter(base_folder, adapter, 1)
    names = {"model": str(base_folder), "prior": str(base_folder), place: adapter}
    words = ["--model.model_name_or_path", names["model"], "--prior.model_name_or_path", names["prior"]]
    words += ["--data.dataset", "unread.jsonl", "--ds.lora.rank", "2", "--ds.zero_stage", "2"]
    parse("train_pipa", words).check()
    with pytest.raises(UserError, match=f"^--ds.{name} cannot be used with the adapter {adapter}, which is merged"):
        parse("train_pipa", [*words, f"--ds.{name}"]).check()
