"""A run knows what it trains, and that it moves."""

import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import run_in_process, save_adapter, train, write_jsonl

from pipa_openrlhf.model import policy
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.training.trainer import Callback

MODULES = {
    "train_pipa": {},
    "train_dpo": {"pipa.variant": None, "data.annotation": None},
    "train_kto": {"pipa.variant": None},
    "train_sft": {"pipa.variant": None, "prior.model_name_or_path": None, "prior.cache_dir": None},
}
SHORT = {"ckpt.save_steps": None}
PAIRS = [{"prompt": f"{n}?", "chosen": "yes" * (n + 1), "rejected": "no"} for n in range(4)]


@pytest.fixture
def run(small_run, tmp_path):
    """Flags of a short run of any module, on data that it takes."""

    def make(module: str, **changes) -> list[str]:
        data = {"data.dataset": write_jsonl(tmp_path / "pairs.jsonl", PAIRS)} if module == "train_dpo" else {}
        return small_run("out", **{**MODULES[module], **SHORT, **data, **changes})

    return make


@pytest.mark.parametrize("module", MODULES)
def test_full_fine_tuning_from_an_adapter_folder_trains_the_model(run, tiny_models, tmp_path, capsys, module):
    save_adapter(tiny_models / "policy", tmp_path / "adapter", 1)
    train(module, *run(module, **{"model.model_name_or_path": tmp_path / "adapter"}))
    start = load_causal_lm(str(tmp_path / "adapter"), torch.float32, "sdpa").state_dict()
    end = load_file(tmp_path / "out" / "model.safetensors")
    still = [name for name in end if torch.equal(start[name], end[name])]
    assert still == []
    head = 16 * 16 + 16 + 16 + 1 if module == "train_pipa" else 0
    size = sum(tensor.numel() for tensor in end.values()) + head
    line = f"{size:,} of {size:,} parameters are trained" + (f", {head} of them in the value head" if head else "")
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("stage", [0, 3])
def test_lora_counts_its_own_parameters(small_run, capsys, stage):
    train("train_pipa", *small_run("out", **{**SHORT, "ds.lora.rank": 2, "ds.zero_stage": stage}))
    trained, total, head = re.search(
        r"^([\d,]+) of ([\d,]+) parameters are trained, (\d+) of them in the value head$",
        capsys.readouterr().out,
        re.MULTILINE,
    ).groups()
    # Four 16 x 16 and three 16 x 32 projections in each of two layers.
    lora = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
    assert int(trained.replace(",", "")) - int(head) == lora
    base = 2 * 258 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert int(total.replace(",", "")) == base + lora + int(head)


@pytest.mark.parametrize("module", ["train_pipa", "train_dpo"])
def test_a_frozen_language_model_is_refused(run, capsys, monkeypatch, module):
    real = policy.load_lm
    monkeypatch.setattr(policy, "load_lm", lambda *args: real(*args).requires_grad_(False))
    assert run_in_process(module, *run(module)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "no parameter of the language model would be trained" in errors[0]


class WithoutRate(Callback):
    """Makes every update leave out the parameters that began with a learning rate."""

    def __init__(self, initial_lr: float):
        self.initial_lr = initial_lr

    def on_update_begin(self, trainer) -> None:
        optimizer = trainer.actor.model.optimizer
        for group in getattr(optimizer, "optimizer", optimizer).param_groups:
            if group["initial_lr"] == self.initial_lr:
                group["lr"] = 0


@pytest.mark.parametrize("dtype, stage", [("fp32", 0), ("bf16", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)])
@pytest.mark.parametrize("fault", [None, "language model", "value head"])
def test_parameters_that_do_not_move_are_noticed(small_run, capsys, dtype, stage, fault):
    rates = {"language model": 0.01, "value head": 0.5}
    callbacks = [WithoutRate(rates[fault])] if fault else []
    changes = {**SHORT, "ds.param_dtype": dtype, "ds.zero_stage": stage, "ds.lora.rank": 2, "value.lr": 0.5}
    words = small_run("out", **changes, **{"lr_scheduler": "constant"})
    status = run_in_process("train_pipa", *words, callbacks=callbacks)
    errors = capsys.readouterr().err
    assert status == (0 if fault is None else 1)
    assert fault is None or f"the first update did not change the {fault}" in errors


def test_warm_up_from_zero_is_no_fault(small_run):
    changes = {"lr_warmup_ratio": 0.5, "lr_scheduler": "constant_with_warmup", "ckpt.save_steps": None}
    rows = train("train_pipa", *small_run("out", **changes))
    assert rows[0]["lr"] == 0 and rows[1]["lr"] > 0


def test_a_run_of_warm_up_alone_says_that_it_trained_nothing(small_run, capsys):
    one_step = {"train.batch_size": 10, "train.max_epochs": 1, **SHORT}
    train("train_pipa", *small_run("still", **one_step))
    assert "Nothing was trained" in capsys.readouterr().out
    train("train_pipa", *small_run("moved", **one_step, **{"lr_warmup_ratio": 0}))
    assert "Nothing was trained" not in capsys.readouterr().out
