"""Models from folders and adapter folders, and LoRA on them."""

import json
import shutil

import pytest
import torch
from tiny import make_model, make_tokenizer, run_in_process, save_adapter, train

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model import loading
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer
from pipa_openrlhf.model.policy import add_lora

IDS = torch.tensor([[5, 9, 70, 8]])


def load(folder):
    return load_causal_lm(str(folder), torch.float32, "sdpa").eval()


def test_adapter_folder_is_merged(tiny_models, tmp_path):
    adapted = save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    merged = load(tmp_path / "adapter")
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(IDS).logits, load(tiny_models / "policy")(IDS).logits, atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    # New LoRA starts at zero: the policy of a second stage is the result of the first.
    with_lora = add_lora(merged, 2, 4, "all-linear", 0.0).eval()
    torch.testing.assert_close(with_lora(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    trainable = [name for name, one in with_lora.named_parameters() if one.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_adapter_on_an_adapter_beside_it(tiny_models, tmp_path):
    """A base named by a relative folder is looked for beside the adapter."""
    shutil.copytree(tiny_models / "policy", tmp_path / "second" / "merged_base")
    adapted = save_adapter(tmp_path / "second" / "merged_base", tmp_path / "second", 2)
    config = tmp_path / "second" / "adapter_config.json"
    record = {**json.loads(config.read_text()), "base_model_name_or_path": "merged_base"}
    config.write_text(json.dumps(record))
    torch.testing.assert_close(load(tmp_path / "second")(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(str(tmp_path / "second")).eos_token_id == 257


@pytest.mark.parametrize("stage", [0, 3])
def test_training_on_an_adapter_folder(small_run, tiny_models, tmp_path, stage):
    """At step 0 the policy is the merged adapter, and that is the prior."""
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    changes = {
        "model.model_name_or_path": tmp_path / "adapter",
        "prior.model_name_or_path": None,
        "ds.lora.rank": 2,
        "ds.zero_stage": stage,
    }
    rows = train("train_pipa", *small_run("out", **changes))
    assert rows[0]["logratio/chosen"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["pipa/value_likelihood"] == pytest.approx(0.5)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_lora_on_the_output_head_is_refused(targets):
    with pytest.raises(UserError, match="--ds.lora.target_modules.*output head"):
        add_lora(make_model(0), 2, 4, targets, 0.0)


def test_all_linear_may_be_given_as_a_word_of_the_command_line():
    model = add_lora(make_model(0), 2, 4, ["all-linear"], 0.0)
    wrapped = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert wrapped == {f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")}


def test_unknown_target_modules_are_refused():
    with pytest.raises(UserError, match="--ds.lora.target_modules.*nothing_like_it"):
        add_lora(make_model(0), 2, 4, ["nothing_like_it"], 0.0)


def test_lora_has_the_dtype_of_its_base():
    model = add_lora(make_model(0).to(torch.bfloat16), 2, 4, "all-linear", 0.0)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_value_head_is_not_wrapped_by_lora(small_run, tmp_path):
    train("train_pipa", *small_run("out", **{"ds.lora.rank": 2}))
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not {"dense", "out", "lm_head"} & set(record["target_modules"])


@pytest.mark.parametrize("damage", ["torn", "missing", "other sizes"])
def test_broken_adapters_are_one_line(tiny_models, tmp_path, damage):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "missing":
        weights.unlink()
    else:
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 3}))
    with pytest.raises(UserError, match=str(tmp_path / "adapter")) as error:
        load(tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no weights", "torn weights", "unknown type", "torn config", "no tokenizer"])
def test_broken_folders_are_one_line(small_run, tiny_models, tmp_path, capsys, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny_models / "policy", model)
    if damage == "no weights":
        (model / "model.safetensors").unlink()
    elif damage == "torn weights":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    elif damage == "unknown type":
        (model / "config.json").write_text('{"model_type": "nonsense"}')
    elif damage == "torn config":
        (model / "config.json").write_text("{")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).unlink()
    assert run_in_process("train_pipa", *small_run("out", **{"model.model_name_or_path": model})) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "model" in errors[0], errors


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "NONSENSE"}', "{}"])
def test_torn_adapter_config_is_one_line(small_run, tmp_path, capsys, text):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    assert run_in_process("train_pipa", *small_run("out", **{"model.model_name_or_path": tmp_path / "adapter"})) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "adapter_config.json" in errors[0], errors


KERNELS = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
    "kernels-community/flash-attn3": "kernels",
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("present", KERNELS)
def test_each_kernel_is_judged_by_its_own_package(monkeypatch, name, present, log_lines):
    packages = {
        kernel: (lambda kernel=kernel: kernel == present, package)
        for kernel, package in KERNELS.items()
        if "/" not in kernel
    }
    monkeypatch.setattr(loading, "_FLASH_PACKAGES", packages)
    monkeypatch.setattr(loading, "is_kernels_available", lambda: "/" in present)
    monkeypatch.setattr(loading, "on_cpu", lambda: False)
    lines = log_lines
    # With the kernels package transformers finds every kernel on the hub.
    expected = name if present == name or "/" in present else "sdpa"
    assert loading.resolve_attention(name, "bf16") == expected
    assert len(lines) == (expected == "sdpa") and all(KERNELS[name] in line for line in lines)
    if expected == name:
        assert loading.resolve_attention(name, "fp32") == "sdpa" and "fp32" in lines[-1]
        monkeypatch.setattr(loading, "on_cpu", lambda: True)
        assert loading.resolve_attention(name, "bf16") == "sdpa" and "GPU" in lines[-1]


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_other_attention_is_taken_as_it_is(name, log_lines):
    assert loading.resolve_attention(name, "fp32") == name and log_lines == []


def test_tokenizer_without_pad_or_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "nopad")
    assert load_tokenizer(str(tmp_path / "nopad")).pad_token_id == 257
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "noeos")
    with pytest.raises(UserError, match="eos"):
        load_tokenizer(str(tmp_path / "noeos"))
