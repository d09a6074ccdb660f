"""Mistakes on the command line end in one line that names the flag, before anything is trained."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import make_model, make_tokenizer, run_in_process, run_module, train, write_jsonl

from pipa_openrlhf.distributed.strategy import on_cpu

LORA = {"ds.lora.rank": 2}
NO_BITSANDBYTES = {"ds.load_in_4bit": True, "ds.param_dtype": "bf16", **LORA}
# What is wrong, and what the one line must name.
BAD = {
    "no model": ({"model.model_name_or_path": None}, "--model.model_name_or_path"),
    "model path": ({"model.model_name_or_path": "./no/such/model"}, "--model.model_name_or_path ./no/such/model"),
    "model is a file": ({"model.model_name_or_path": __file__}, "--model.model_name_or_path"),
    "model is another folder": ({"model.model_name_or_path": os.path.dirname(__file__)}, "config.json"),
    "prior path": ({"prior.model_name_or_path": "/no/such/prior"}, "--prior.model_name_or_path /no/such/prior"),
    "two priors": ({"ref.model_name_or_path": "/another"}, "--ref.model_name_or_path"),
    "no data": ({"data.dataset": None}, "--data.dataset"),
    "data path": ({"data.dataset": "/no/such/data.jsonl"}, "/no/such/data.jsonl"),
    "evaluation data path": ({"eval.dataset": "/no/such/eval.jsonl"}, "/no/such/eval.jsonl"),
    "dtype": ({"ds.param_dtype": "float32"}, "--ds.param_dtype"),
    "fixed value": ({"pipa.fixed_value": 1.0}, "--pipa.fixed_value"),
    "fixed value is no number": ({"pipa.fixed_value": "half"}, "--pipa.fixed_value"),
    "fixed value and a head": ({"pipa.fixed_value": 0.5, "value.lr": 0.1}, "--value.lr"),
    "clip": ({"pipa.clip_eps": 0}, "--pipa.clip_eps"),
    "variant": ({"pipa.variant": "p"}, "--pipa.variant"),
    "reduction": ({"pipa.loss_reduction": "mean"}, "--pipa.loss_reduction"),
    "head from nowhere": ({"value.init_from": "/no/such/head"}, "--value.init_from"),
    "head with a size": ({"value.init_from": "/x", "value.hidden_size": 4}, "--value.hidden_size"),
    "probabilities": ({"data.dataset_probs": "0.5,0.5"}, "--data.dataset_probs"),
    "probabilities are words": ({"data.dataset_probs": "all"}, "--data.dataset_probs"),
    "a probability is zero": (
        {"data.dataset": "a.jsonl,b.jsonl", "data.dataset_probs": "0,1"},
        "--data.dataset_probs",
    ),
    "an empty name": ({"data.dataset": "a.jsonl,"}, "--data.dataset"),
    "merge without LoRA": ({"ckpt.merge_lora": True}, "--ckpt.merge_lora"),
    "ring attention": ({"ds.ring_attn_size": 2}, "--ds.ring_attn_size"),
    "tensor parallel": ({"ds.tensor_parallel_size": 2}, "--ds.tensor_parallel_size"),
    "zero stage": ({"ds.zero_stage": 4}, "--ds.zero_stage"),
    "muon and value lr": ({"optim": "muon", "value.lr": 0.1}, "--value.lr"),
    "muon checkpoints": ({"optim": "muon", "ckpt.save_steps": 1}, "--optim muon"),
    "batch size": ({"train.batch_size": 0}, "--train.batch_size"),
    "micro batch size": ({"train.micro_batch_size": -1}, "--train.micro_batch_size"),
    "epochs": ({"train.max_epochs": 0}, "--train.max_epochs"),
    "learning rate": ({"adam.lr": "-1e-3"}, "--adam.lr"),
    "learning rate is nan": ({"adam.lr": "nan"}, "--adam.lr"),
    "learning rate is a word": ({"adam.lr": "fast"}, "--adam.lr"),
    "learning rate is infinite": ({"adam.lr": "inf"}, "--adam.lr"),
    "betas": ({"adam.betas": [0.9, 1.0]}, "--adam.betas"),
    "warm-up": ({"lr_warmup_ratio": 1.5}, "--lr_warmup_ratio"),
    "one beta": ({"adam.betas": 0.9}, "--adam.betas"),
    "scheduler": ({"lr_scheduler": "cosin"}, "--lr_scheduler cosin"),
    "save steps": ({"ckpt.save_steps": 0}, "--ckpt.save_steps"),
    "dropout": ({**LORA, "ds.lora.dropout": 1.0}, "--ds.lora.dropout"),
    "LoRA alpha": ({**LORA, "ds.lora.alpha": 0}, "--ds.lora.alpha"),
    "target modules": ({**LORA, "ds.lora.target_modules": ["attention"]}, "--ds.lora.target_modules"),
    "output head": ({**LORA, "ds.lora.target_modules": ["lm_head"]}, "--ds.lora.target_modules"),
    "threshold": ({"data.step_threshold": 2}, "--data.step_threshold"),
    "template with two {}": ({"data.input_template": "{} {}"}, "--data.input_template"),
    "chat template": ({"data.tokenizer_chat_template": "x"}, "--data.tokenizer_chat_template"),
    "switch": ({"data.mask_tool_output": "yes"}, "--data.mask_tool_output"),
    "resume and overwrite": ({"ckpt.load_enable": True, "ckpt.overwrite": True}, "--ckpt.overwrite"),
    "output is a file": ({"ckpt.output_dir": __file__}, "--ckpt.output_dir"),
    "output below a file": ({"ckpt.output_dir": f"{__file__}/out"}, "--ckpt.output_dir"),
    "max length": ({"data.max_len": 3}, "--data.max_len"),
    "max length 1": ({"data.max_len": 1}, "--data.max_len"),
    "max samples": ({"data.max_samples": 0}, "--data.max_samples"),
    "unknown flag": ({"pipa.varient": "m"}, "--pipa.varient"),
    "aux loss on a dense model": ({"model.aux_loss_coef": 0.1}, "--model.aux_loss_coef"),
}


def error_line(capsys, words) -> str:
    """Standard error must have one line of ours, the status must be 1, and nothing may have been trained."""
    assert run_in_process("train_pipa", *words) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err and "Train step" not in captured.err
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line(small_run, capsys, name):
    changes, named = BAD[name]
    words = small_run("out", **{"ckpt.save_steps": None, **changes})
    assert named in error_line(capsys, words)


@pytest.mark.skipif(not on_cpu(), reason="these work with CUDA")
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"ds.param_dtype": "fp16"}, "--ds.param_dtype fp16"),
        (NO_BITSANDBYTES, "--ds.load_in_4bit"),
        ({"ds.use_liger_kernel": True}, "--ds.use_liger_kernel"),
    ],
)
def test_what_this_machine_cannot_do(small_run, capsys, changes, named):
    assert named in error_line(capsys, small_run("out", **changes))


def test_a_process_says_it_last(small_run):
    """After whatever the libraries print that were imported by then."""
    changes, named = BAD["output is a file"]
    result = run_module("train_pipa", *small_run("out", **changes))
    assert result.returncode == 1 and named in result.stderr.splitlines()[-1]


REFUSE_EACH = """
import json, sys
from pipa_openrlhf.cli.train_pipa import cli

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    print(cli(), sorted({"transformers", "deepspeed", "datasets"} & sys.modules.keys()))
"""


def test_flags_are_checked_before_anything_heavy_is_imported(small_run):
    """One new process for all: nothing but a line for each on standard error."""
    cases = [BAD[name] for name in ("no model", "scheduler", "unknown flag", "a probability is zero", "max length 1")]
    words = [small_run("out", **{"ckpt.save_steps": None, **changes}) for changes, _ in cases]
    command = [sys.executable, "-c", REFUSE_EACH, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["1 []"] * len(cases), done.stderr[-2000:]
    for line, (_, named) in zip(done.stderr.splitlines(), cases, strict=True):
        assert line.startswith("error: ") and named in line


def test_tokenizer_of_another_model(small_run, tiny_models, tmp_path, capsys):
    """Token ids beyond the model's vocabulary would index past its embeddings."""
    make_model(0, vocab_size=200, eos_token_id=1, pad_token_id=1).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    line = error_line(capsys, small_run("out", **{"model.model_name_or_path": tmp_path / "small"}))
    assert "--model.model_name_or_path" in line and "257" in line and "200" in line
    line = error_line(capsys, small_run("out", **{"prior.model_name_or_path": tmp_path / "small"}))
    assert "--prior.model_name_or_path" in line and "200" in line


def test_prior_with_another_tokenizer(small_run, tiny_models, tmp_path, capsys):
    shutil.copytree(tiny_models / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "tokenizer.json"
    text = path.read_text()
    # Two letters of the data change places.
    swapped = text.replace('"x":', '"@@":').replace('"s":', '"x":').replace('"@@":', '"s":')
    assert swapped != text
    path.write_text(swapped)
    line = error_line(capsys, small_run("out", **{"prior.model_name_or_path": tmp_path / "prior"}))
    assert "--prior.model_name_or_path" in line and "tokenizer" in line
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "prior" / name).unlink()
    assert train("train_pipa", *small_run("trusted", **{"prior.model_name_or_path": tmp_path / "prior"}))


def test_value_head_of_another_model(small_run, tmp_path, capsys):
    make_model(0, hidden_size=32).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    wide = {"model.model_name_or_path": tmp_path / "wide", "prior.model_name_or_path": None}
    train("train_pipa", *small_run("first", **{**wide, "ckpt.save_steps": None}))
    capsys.readouterr()
    line = error_line(capsys, small_run("second", **{"value.init_from": tmp_path / "first"}))
    assert "--value.init_from" in line and "32" in line and "16" in line


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "export"])
def test_full_disk_is_one_line(small_run, tmp_path, capsys, monkeypatch, what):
    from safetensors import SafetensorError

    from pipa_openrlhf.training import checkpoint, export
    from pipa_openrlhf.training import metrics as metrics_log

    def full(*_args, **_options):
        if what == "metrics":
            raise OSError(28, "No space left on device", str(tmp_path / "metrics.jsonl"))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if what == "metrics":
        monkeypatch.setattr(metrics_log.MetricsLog, "write", full)
    else:
        monkeypatch.setattr(
            *((checkpoint, "save_file") if what == "checkpoint" else (export, "save_value_head")), full
        )
    assert run_in_process("train_pipa", *small_run("out")) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "No space left on device" in lines[0]
    # The unfinished checkpoint is not taken for a whole one.
    monkeypatch.undo()
    assert len(train("train_pipa", *small_run("out"), "--ckpt.load_enable")) == 6


def test_micro_batch_larger_than_a_share_is_lowered(small_run, capsys):
    rows = train("train_pipa", *small_run("out", **{"train.micro_batch_size": 64}))
    noted = [line for line in capsys.readouterr().out.splitlines() if "--train.micro_batch_size 64" in line]
    assert len(rows) == 6 and len(noted) == 1 and "using 4" in noted[0]


def test_flags_without_meaning_are_noted_in_one_line(small_run, capsys):
    changes = {"model.beta": 0.2, "model.ipo_enable": True, "ref.offload": True, "model.label_smoothing": 0.0}
    train("train_pipa", *small_run("out", **changes))
    noted = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert [line.split()[0] for line in noted] == ["--model.beta", "--model.ipo_enable", "--ref.offload"]


def test_ref_is_prior_by_another_name(small_run, tiny_models, tmp_path, capsys):
    prior = {"prior.model_name_or_path": None, "ref.model_name_or_path": tiny_models / "prior"}
    train("train_pipa", *small_run("out", **{**prior, "ckpt.save_steps": None}))
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    assert record["prior.model_name_or_path"] == record["ref.model_name_or_path"] == str(tiny_models / "prior")
    capsys.readouterr()
    changes = {"pipa.variant": None, "prior.cache_dir": None, "ckpt.save_steps": None}
    train("train_sft", *small_run("sft", **{**prior, **changes}))
    assert "--ref.model_name_or_path has no effect in train_sft" in capsys.readouterr().out.splitlines()


def test_dpo_without_pairs_is_refused_by_its_flag(small_run, capsys):
    flags = small_run("out", **{"pipa.variant": None, "data.pairing": "auto"})
    assert run_in_process("train_dpo", *flags) == 1
    assert "data.jsonl holds single answers and pairs are wanted: give --data.pairing match" in capsys.readouterr().err


def test_nothing_is_left_of_a_refused_run(small_run, tmp_path, capsys):
    error_line(capsys, small_run("out", **{"data.dataset": "/no/such/data.jsonl"}))
    assert not (tmp_path / "out").exists()


def test_prompt_that_is_too_long_is_dropped_not_cut(small_run, tmp_path, capsys):
    rows = [{"prompt": "p" * n, "completion": "yes", "label": n % 2} for n in (3, 5, 90)]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    changes = {"data.dataset": data, "data.annotation": None, "data.max_len": 20, "train.max_epochs": 1}
    assert train("train_pipa", *small_run("out", **changes))[-1]["num_tokens"] == 3 + 5 + 2 * 4
    assert "longer than --data.max_len" in capsys.readouterr().out
