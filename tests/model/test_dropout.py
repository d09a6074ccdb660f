"""The model's own dropout is off while the policy is trained, wherever its code reads it from."""

import math

import pytest
import torch
from tiny import make_model, make_tokenizer, train, write_jsonl
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from pipa_openrlhf.model.policy import add_lora, disable_dropout

IDS = torch.tensor([[5, 9, 70, 8, 11, 12]])
PAIRS = [{"prompt": f"{n}?", "chosen": "yes" * (n + 1), "rejected": "no"} for n in range(4)]
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 258}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 258, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, eos_token_id=257, bos_token_id=257))


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: make_model(0, attention_dropout=0.5),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(hidden_size=16, n_head=2, n_layer=2, vocab_size=258, hidden_dropout=0.5, attention_dropout=0.5)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL, hidden_dropout=0.5, attention_dropout=0.5)),
    "phi": lambda: PhiForCausalLM(
        PhiConfig(**SMALL, intermediate_size=32, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=32, hidden_dropout=0.5, attention_dropout=0.5)
    ),
}


def in_training_and_evaluation(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.train()(IDS).logits, model.eval()(IDS).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_training_mode_is_evaluation_mode(name, attention):
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    training, evaluation = in_training_and_evaluation(model)
    assert not torch.equal(training, evaluation)
    assert disable_dropout(model) > 0
    training, evaluation = in_training_and_evaluation(model)
    torch.testing.assert_close(training, evaluation, rtol=0, atol=0)
    assert disable_dropout(model) == 0


def test_dropout_of_lora_stays():
    model = make_model(0, attention_dropout=0.5)
    disable_dropout(model)
    adapted = add_lora(model, 2, 4, "all-linear", 0.5)
    assert {module.p for module in adapted.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize("kept", [False, True])
def test_first_loss_of_gpt2(small_run, tmp_path, capsys, kept):
    gpt2().save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    changes = {
        "model.model_name_or_path": tmp_path / "gpt2",
        "prior.model_name_or_path": None,
        "pipa.variant": None,
        "data.annotation": None,
        "data.dataset": write_jsonl(tmp_path / "pairs.jsonl", PAIRS),
        "model.beta": 1.0,
        "model.keep_dropout": kept,
        "ckpt.save_steps": None,
    }
    first = train("train_dpo", *small_run("out", **changes))[0]["loss"]
    assert (abs(first - math.log(2)) < 1e-5) is not kept
    assert ("--model.keep_dropout" in capsys.readouterr().out) is not kept
