"""What a run leaves behind opens in PEFT and transformers, and is the policy that was trained."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from reference import value_logits
from safetensors.torch import load_file
from tiny import make_model, make_qwen, make_tokenizer, read_jsonl, save_adapter, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import pipa_openrlhf
from pipa_openrlhf.config import CheckpointConfig, ModelConfig, RunConfig
from pipa_openrlhf.model.fit import whole_rows
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.training import sharded_weights
from pipa_openrlhf.training.export import drop_old_exports
from pipa_openrlhf.training.trainer import Callback

LORA = {"ds.lora.rank": 4}
PROMPT, ANSWER = [84, 10, 84, 30], [91, 20, 257]
IDS = torch.tensor([PROMPT + ANSWER])


class Exported(Callback):
    """What the policy gives for ``IDS`` when it is exported, the last time if more than once."""

    def __init__(self):
        self.seen: dict[str, torch.Tensor] = {}

    def on_export_begin(self, trainer, folder) -> None:
        policy = trainer.actor.model.module.eval()
        with torch.no_grad():
            output = policy(whole_rows(IDS))
        first = len(PROMPT) - 1
        self.seen = {"log_f": output.log_f[0, first:], "u": output.u[0, first:]}


@pytest.fixture
def trained(small_run, tmp_path):
    """``trained(name, flags)`` -> a run's folder, its policy's log-probs and value logits, and its metrics."""

    def make(name: str, changes: dict):
        exported = Exported()
        words = small_run(name, **{"ckpt.save_steps": None, **changes})
        rows = train("train_pipa", *words, callbacks=[exported])
        return tmp_path / name, exported.seen, rows

    return make


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval().float()(IDS).logits[0, len(PROMPT) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, IDS[0, len(PROMPT) :, None])[:, 0]


def with_adapter(folder, base) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapter_is_the_trained_policy(trained, tiny_models, stage):
    folder, seen, _ = trained("out", {**LORA, "ds.zero_stage": stage})
    torch.testing.assert_close(
        log_probs(with_adapter(folder, tiny_models / "policy")), seen["log_f"], rtol=1e-4, atol=1e-4
    )
    base = log_probs(AutoModelForCausalLM.from_pretrained(tiny_models / "policy", dtype=torch.float32))
    assert (base - seen["log_f"]).abs().max() > 0.01
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_models / "policy"
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_full_fine_tuning_is_the_trained_policy(trained, stage):
    folder, seen, _ = trained("out", {"ds.zero_stage": stage})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    assert not (folder / "adapter_config.json").exists()


def test_large_weights_are_written_shard_by_shard(trained, monkeypatch):
    """The embeddings, a layer, another with the norm, the head; a layer has 10,368 bytes."""
    folder, _, _ = trained("one", {"ds.zero_stage": 3})
    held = []
    real = sharded_weights.ShardedWeights.add

    def add(self, name, tensor):
        real(self, name, tensor)
        held.append(sum(one.nbytes for one in (*self._waiting.values(), *self._of_layer.values())))

    monkeypatch.setattr(sharded_weights, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(sharded_weights.ShardedWeights, "add", add)
    sharded, seen, _ = trained("several", {"ds.zero_stage": 3})
    shards = sorted(name for name in files(sharded) if name.startswith("model-"))
    assert shards == [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert max(held) <= 20_000 + 10_368
    assert [path for path in files(sharded) if ".export" in path] == []
    whole = load_file(folder / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(sharded / file)[name], whole[name])
    layers = [{file for name, file in index["weight_map"].items() if f"layers.{n}." in name} for n in (0, 1)]
    assert [len(of_layer) for of_layer in layers] == [1, 1], "a layer is in one file"
    model = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_merged_weights(trained, stage):
    folder, seen, _ = trained("out", {**LORA, "ckpt.merge_lora": True, "ds.zero_stage": stage})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files(folder)


@pytest.mark.parametrize("merge", [False, True])
def test_policy_that_started_from_an_adapter(trained, tiny_models, tmp_path, merge):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    changes = {**LORA, "model.model_name_or_path": tmp_path / "adapter", "ckpt.merge_lora": merge}
    folder, seen, _ = trained("out", changes)
    assert (folder / "merged_base").exists() is not merge
    if merge:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = with_adapter(folder, folder / "merged_base")
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    # And a third stage goes on from there.
    _, _, rows = trained("third", {**LORA, "model.model_name_or_path": folder, "prior.model_name_or_path": None})
    assert rows[0]["logratio/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.fixture
def tied(tmp_path):
    make_model(3, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_tied_embeddings(trained, tied, stage):
    folder, seen, _ = trained("out", {"model.model_name_or_path": tied, "ds.zero_stage": stage})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    assert load_file(folder / "model.safetensors").keys() == load_file(tied / "model.safetensors").keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merge", [False, True])
def test_lora_on_tied_embeddings(trained, tied, merge):
    """The adapter changes the embeddings alone; the merged model and the next stage must not change the head."""
    changes = {"model.model_name_or_path": tied, "ds.lora.target_modules": ["embed_tokens", "q_proj"]}
    folder, seen, _ = trained("out", {**LORA, **changes, "ckpt.merge_lora": merge, "ds.lora.alpha": 64})
    model = load_causal_lm(str(folder), torch.float32, "sdpa")
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    if merge:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, LORA, {**LORA, "ckpt.merge_lora": True}], ids=["full", "lora", "merged"])
def test_configs_are_written_as_they_were_read(trained, tiny_models, tmp_path, changes):
    """One that transformers loads and refuses to write, dropout that is off while training, an old spelling."""
    shutil.copytree(tiny_models / "policy", tmp_path / "base")
    generation = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "made_by": "hand"}\n'
    (tmp_path / "base" / "generation_config.json").write_text(generation)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("rope_parameters"), config.pop("dtype")
    config.update(attention_dropout=0.25, rope_theta=10000.0, torch_dtype="float32", made_by="hand")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    folder, seen, _ = trained("out", {**changes, "model.model_name_or_path": tmp_path / "base"})
    if changes != LORA:
        assert (folder / "generation_config.json").read_text() == generation
        assert json.loads((folder / "config.json").read_text()) == config
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=1e-4, atol=1e-4)
    (tmp_path / "base" / "generation_config.json").unlink()
    folder, _, _ = trained("without", {**changes, "model.model_name_or_path": tmp_path / "base"})
    assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_bf16(trained, tiny_models, changes):
    folder, seen, _ = trained("out", {**changes, "ds.param_dtype": "bf16", "ds.zero_stage": 2})
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    assert {tensor.dtype for tensor in load_file(folder / name).values()} == {torch.bfloat16}
    model = with_adapter(folder, tiny_models / "policy") if changes else AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(log_probs(model), seen["log_f"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "changes", [{}, LORA, {**LORA, "ckpt.value_model": True}], ids=["full", "lora", "value model"]
)
def test_stage_three_on_two_ranks_exports_the_same(small_run, two_ranks, tmp_path, changes):
    changes = {**changes, "ckpt.save_steps": None, "adam.lr": 1e-3}
    if "ckpt.value_model" in changes:
        changes["model.model_name_or_path"] = make_qwen(tmp_path / "qwen")
    train("train_pipa", *small_run("two", **{**changes, "ds.zero_stage": 2}))
    result = two_ranks("train_pipa", *small_run("three", **{**changes, "ds.zero_stage": 3}))
    assert result.returncode == 0, result.stderr[-2000:]
    assert files(tmp_path / "two") == files(tmp_path / "three")
    for name in files(tmp_path / "two"):
        if name.endswith(".safetensors"):
            two, three = load_file(tmp_path / "two" / name), load_file(tmp_path / "three" / name)
            assert two.keys() == three.keys()
            for key in two:
                torch.testing.assert_close(three[key], two[key], rtol=1e-3, atol=1e-4)


def test_value_head_is_the_trained_one_and_goes_on(trained, small_run, tiny_models):
    folder, seen, rows = trained("out", {**LORA, "adam.lr": 0, "value.lr": 0.05})
    head = load_file(folder / "value_head.safetensors")
    assert {tensor.dtype for tensor in head.values()} == {torch.float32}
    u = value_logits(tiny_models / "policy", head, PROMPT, ANSWER)
    assert seen["u"].numpy() == pytest.approx(u, rel=1e-3) and abs(u).max() > 0.1
    assert rows[-1]["pipa/value_likelihood"] > rows[0]["pipa/value_likelihood"] == pytest.approx(0.5)
    config = json.loads((folder / "value_head_config.json").read_text())
    assert (config["input_size"], config["hidden_size"]) == (16, 16)
    # Starting from it goes on where it was: a run of one whole batch says the same before and after.
    whole = {"train.batch_size": 10, "adam.lr": 0, "train.max_epochs": 1}
    start = trained("next", {**whole, "value.init_from": folder})[2][0]["pipa/value_likelihood"]
    fresh = trained("fresh", whole)[2][0]["pipa/value_likelihood"]
    assert fresh == pytest.approx(0.5) and start > rows[0]["pipa/value_likelihood"] + 0.02


def test_two_learning_rates(trained, tiny_models):
    folder, _, _ = trained("out", {"adam.lr": 0.01, "value.lr": 0})
    head = load_file(folder / "value_head.safetensors")
    assert not head["out.weight"].any() and not head["out.bias"].any()
    before, after = (load_file(path / "model.safetensors") for path in (tiny_models / "policy", folder))
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("changes", [{}, LORA, {**LORA, "ckpt.merge_lora": True}], ids=["full", "lora", "merged"])
def test_folder_is_complete_and_holds_no_pickle(trained, changes):
    folder, _, rows = trained("out", {**changes, "logger.wandb.key": None})
    names = files(folder)
    assert {"args.json", "README.md", "metrics.jsonl", "tokenizer.json", "value_head.safetensors"} <= names
    assert [name for name in names if re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", name)] == []
    card = (folder / "README.md").read_text()
    for text in (
        "PIPA-N",
        "data.jsonl",
        "torch ",
        "deepspeed ",
        "pipa_openrlhf.cli.train_pipa",
        f"{rows[-1]['loss']:.6g}",
    ):
        assert text in card
    record = json.loads((folder / "args.json").read_text())
    assert record["resolved.finished"] is True and record["resolved.total_steps"] == 6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("a\nb").input_ids
        == AutoTokenizer.from_pretrained(record["model.model_name_or_path"])("a\nb").input_ids
    )
    assert tokenizer.chat_template


def test_checkpoints_hold_no_pickle(small_run, tmp_path):
    train("train_pipa", *small_run("out", **{"ckpt.save_hf": True}))
    assert {os.path.splitext(name)[1] for name in files(tmp_path / "out" / "checkpoints")} <= {
        ".safetensors",
        ".json",
        ".jinja",
        ".md",
    }


def test_intermediate_export_is_the_policy_after_that_step(small_run, tmp_path, tiny_models):
    train("train_pipa", *small_run("six", **{**LORA, "ckpt.save_hf": True, "ckpt.save_steps": 3}))
    folder = tmp_path / "six" / "checkpoints" / "global_step6_hf"
    last, final = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "six"))
    third = load_file(tmp_path / "six" / "checkpoints" / "global_step3_hf" / "adapter_model.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(third[name], final[name]) for name in final)
    assert len(read_jsonl(tmp_path / "six" / "metrics.jsonl")) == 6


@pytest.mark.parametrize("merge", [False, True])
def test_intermediate_exports_are_rotated_and_share_one_base(small_run, tmp_path, tiny_models, merge):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    changes = {**LORA, "model.model_name_or_path": tmp_path / "adapter", "ckpt.merge_lora": merge}
    train("train_pipa", *small_run("out", **{**changes, "ckpt.save_hf": True, "ckpt.max_num": 2}))
    folder = tmp_path / "out" / "checkpoints"
    kept = {"global_step5", "global_step6", "global_step5_hf", "global_step6_hf"}
    assert {path.name for path in folder.iterdir()} == kept
    bases = [path for path in (tmp_path / "out").rglob("*") if path.name.startswith("merged_base")]
    assert bases == ([] if merge else [tmp_path / "out" / "merged_base"])
    last = folder / "global_step6_hf"
    if merge:
        same = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
        final = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    else:
        same, final = (load_causal_lm(str(path), torch.float32, "sdpa") for path in (last, tmp_path / "out"))
    torch.testing.assert_close(log_probs(same), log_probs(final), rtol=0, atol=0)


def test_rotation_spares_what_the_run_started_from(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"global_step{step}_hf").mkdir()
    model = ModelConfig(model_name_or_path=str(tmp_path / "global_step2_hf"))
    drop_old_exports(RunConfig(model=model, ckpt=CheckpointConfig(path=str(tmp_path), max_num=1)))
    assert {path.name for path in tmp_path.iterdir()} == {"global_step2_hf", "global_step5_hf"}


def test_unsafe_calls_occur_nowhere_in_the_package():
    root = Path(pipa_openrlhf.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        text = path.read_text()
        for word in ("torch.cuda.", "weights_only=" + "False", "pickle." + "load", "trust_remote_code=" + "True"):
            if word in text and not (word == "torch.cuda." and path.parent.name == "distributed"):
                found.append((str(path), word))
    assert found == []
