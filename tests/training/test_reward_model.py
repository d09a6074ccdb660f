"""The value model that vLLM serves: what is in its folder gives our values in a module of its own layout."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_export import files
from tiny import make_qwen, make_tokenizer, run_in_process, save_adapter, train
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from pipa_openrlhf.model.policy import ValueHead, save_value_head
from pipa_openrlhf.model.value_model import load_value_model
from pipa_openrlhf.training import export, sharded_weights

SEQUENCES = [[84, 10, 84, 30, 91, 20], [5], [200, 7, 9, 257]]
TRAINED = {"ckpt.save_steps": None, "ckpt.value_model": True, "value.lr": 0.05, "train.max_epochs": 1}
LORA = {"ds.lora.rank": 4}


class Qwen2Rewards(nn.Module):
    """Qwen2ForRewardModel as Qwen published it and vLLM has it: names, order and nothing else."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.model = Qwen2Model(config)
        size = config.hidden_size
        self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))

    def forward(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.score(self.model(torch.tensor([ids])).last_hidden_state)[0, :, 0].numpy()


def load_rewards(folder) -> Qwen2Rewards:
    config = Qwen2Config.from_pretrained(folder)
    model = Qwen2Rewards(config).float().eval()
    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    model.load_state_dict({name: one.float() for name, one in weights.items()})  # strict: all names, and no other
    return model


@pytest.fixture
def qwen_run(small_run, tmp_path):
    """``qwen_run(changes)`` -> flags of a run of a Qwen2 model, exported to ``out``."""
    base = make_qwen(tmp_path / "qwen")
    return lambda changes=(): small_run("out", **{"model.model_name_or_path": base, **TRAINED, **dict(changes)})


def assert_same_values(export, folder, tolerance=2e-6):
    ours, rewards = load_value_model(str(export), torch.float32), load_rewards(folder)
    for ids, values in zip(SEQUENCES, ours.token_values(SEQUENCES)):
        scores = rewards(ids)
        np.testing.assert_allclose(1 / (1 + np.exp(-scores)), values, atol=tolerance)
    spread = np.concatenate(ours.token_values(SEQUENCES))
    assert np.ptp(spread) > 1e-3, "or any head would do"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LORA,
        {**LORA, "ckpt.merge_lora": True},
        {**LORA, "ds.zero_stage": 3},
        {"value.hidden_size": 5},
        {**LORA, "ds.lora.target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["full", "lora", "merged", "zero3", "narrow", "embeddings"],
)
@pytest.mark.filterwarnings("ignore")
def test_scores_are_the_logits_of_our_values(qwen_run, tmp_path, changes):
    train("train_pipa", *qwen_run(changes))
    folder = tmp_path / "out" / "value_model"
    assert_same_values(tmp_path / "out", folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["num_labels"]) == (["Qwen2ForRewardModel"], 1)
    assert config["model_type"] == "qwen2" and "auto_map" not in config
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files(folder)
    assert "generation_config.json" not in files(folder)
    assert AutoTokenizer.from_pretrained(folder)("a\nb").input_ids == make_tokenizer()("a\nb").input_ids
    score = {name: one for name, one in load_file(folder / "model.safetensors").items() if name.startswith("score.")}
    assert {name: (tuple(one.shape), one.dtype) for name, one in score.items()} == {
        "score.0.weight": ((16, 16), torch.float32),
        "score.0.bias": ((16,), torch.float32),
        "score.2.weight": ((1, 16), torch.float32),
        "score.2.bias": ((1,), torch.float32),
    }
    exported = {"adapter_config.json"} & files(tmp_path / "out")
    assert exported == (
        {"adapter_config.json"} if "ds.lora.rank" in changes and "ckpt.merge_lora" not in changes else set()
    )


def test_tied_embeddings_and_a_start_from_an_adapter(small_run, tmp_path):
    make_qwen(tmp_path / "base", tie_word_embeddings=True)
    save_adapter(tmp_path / "base", tmp_path / "adapter", 1)
    train("train_pipa", *small_run("out", **{**TRAINED, **LORA, "model.model_name_or_path": tmp_path / "adapter"}))
    assert_same_values(tmp_path / "out", tmp_path / "out" / "value_model")


def test_large_weights_are_written_shard_by_shard(qwen_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_weights, "SHARD_BYTES", 20_000)
    train("train_pipa", *qwen_run(LORA))
    folder = tmp_path / "out" / "value_model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and index["score.2.bias"] in files(folder)
    assert_same_values(tmp_path / "out", folder)


def test_the_backbone_keeps_its_type_and_the_head_its_precision(qwen_run, tmp_path):
    train("train_pipa", *qwen_run({"ds.param_dtype": "bf16", "ds.zero_stage": 2}))
    weights = load_file(tmp_path / "out" / "value_model" / "model.safetensors")
    types = {name.partition(".")[0]: one.dtype for name, one in weights.items()}
    assert types == {"model": torch.bfloat16, "score": torch.float32}
    assert json.loads((tmp_path / "out" / "value_model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_values(tmp_path / "out", tmp_path / "out" / "value_model")


def test_exports_of_a_step_have_one_too_and_all_files_are_the_runs(qwen_run, tmp_path):
    train("train_pipa", *qwen_run({**LORA, "ckpt.save_steps": 3, "ckpt.save_hf": True}))
    step = tmp_path / "out" / "checkpoints" / "global_step3_hf"
    assert_same_values(step, step / "value_model")
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    assert set(manifest["files"]) == files(tmp_path / "out") - {"run_manifest.json"}


def refusal(capsys, words) -> str:
    capsys.readouterr()
    assert run_in_process("train_pipa", *words) == 1
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert "Train step" not in captured.err
    return line


def test_what_has_no_such_layout_is_refused_before_training(qwen_run, small_run, tmp_path, capsys):
    wide = refusal(capsys, qwen_run({"value.hidden_size": 17}))
    assert "hidden size 16" in wide and "--value.hidden_size has 17" in wide
    torch.manual_seed(0)
    save_value_head(str(tmp_path), ValueHead(16, 20, torch.float32).state_dict())
    assert f"--value.init_from {tmp_path} has 20" in refusal(capsys, qwen_run({"value.init_from": tmp_path}))
    assert "trains none here" in refusal(capsys, qwen_run({"pipa.fixed_value": 0.5, "value.lr": None}))
    assert "policy is llama" in refusal(capsys, small_run("out", **TRAINED))
    assert not (tmp_path / "out" / "value_model").exists()


def test_a_disk_without_room_for_it_is_refused(qwen_run, capsys, monkeypatch):
    # The weights of the model, once with its output head and once without; the head; masters and moments.
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(qwen_run()[1]))
    base = sum(one.numel() for one in model.parameters())
    needed = 4 * base + 4 * (base - 258 * 16) + 4 * (16 * 16 + 16 + 16 + 1) + 12 * base
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: free)
    assert "GB free" in refusal(capsys, qwen_run())
    free.free = needed
    assert run_in_process("train_pipa", *qwen_run()) == 0


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run_readme(folder, monkeypatch) -> dict:
    """What the Python of a card leaves, but for that which needs vLLM."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for code in CODE.findall((folder / "README.md").read_text()):
        if "vllm" not in code:
            exec(code, names)
    return names


@pytest.mark.parametrize("rank, room", [(0, None), (20, 32)])
def test_the_card_says_how_to_use_the_export_and_its_code_runs(qwen_run, tmp_path, monkeypatch, rank, room, capsys):
    train("train_pipa", *qwen_run({"ds.lora.rank": rank, "ckpt.save_steps": 2, "ckpt.save_hf": True}))
    final, step = tmp_path / "out", tmp_path / "out" / "checkpoints" / "global_step2_hf"
    expected = load_value_model(str(final), torch.float32).lm
    for folder in (final, step):
        card = (folder / "README.md").read_text()
        assert f"- base model: `{tmp_path / 'qwen'}`" in card and "Qwen2ForRewardModel" in card
        assert ("| loss |" in card) is (folder == final)
        served = f"vllm serve {tmp_path / 'qwen'} --enable-lora --max-lora-rank {room} --lora-modules pipa=.\n"
        assert (served if rank else "vllm serve .\n") in card
    names = run_readme(final, monkeypatch)
    ids = torch.tensor(SEQUENCES[:1])
    with torch.no_grad():
        logits = expected(ids).logits
        torch.testing.assert_close(names["model"].float()(ids).logits, logits, rtol=1e-4, atol=1e-4)
        if rank:
            merged = Qwen2ForCausalLM.from_pretrained(final / "merged").float()
            torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert re.search(r"^\[0\.\d+\]$", capsys.readouterr().out, re.MULTILINE)


def test_the_card_of_a_rank_that_vllm_refuses_says_so(qwen_run, tmp_path):
    train("train_pipa", *qwen_run({"ds.lora.rank": 513, "ckpt.value_model": None}))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vLLM takes no adapter of rank 513" in card and "vllm serve" not in card and "value_model/" not in card
