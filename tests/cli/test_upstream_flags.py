"""Every flag of the installed OpenRLHF's train_dpo exists here, with its meaning and default."""

import argparse
import ast
import importlib.util
import json
import re
from datetime import datetime

import pytest
from tiny import train

from pipa_openrlhf.cli.flags import MODULES, build_parser, parse
from pipa_openrlhf.errors import UserError

MODULES = sorted(name for name in MODULES if name.startswith("train_"))
# Ours, and no other.
EXCEPTIONS = {
    "ckpt.path": {"default": None},
    "ds.param_dtype": {"choices": ["bf16", "fp16", "fp32"]},
}


def upstream_parser() -> argparse.ArgumentParser:
    """The parser that ``python -m openrlhf.cli.train_dpo`` builds, from its source; nothing of it is imported."""
    package = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
    with open(f"{package}/cli/train_dpo.py") as file:
        tree = ast.parse(file.read())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    parser = argparse.ArgumentParser()
    for call in sorted(calls, key=lambda call: call.lineno):
        eval(compile(ast.Expression(call), "train_dpo", "eval"), {"parser": parser, "datetime": datetime})
    return parser


UPSTREAM = {word: action for action in upstream_parser()._actions for word in action.option_strings}


def test_upstream_was_read():
    assert len(UPSTREAM) > 80 and "--model.beta" in UPSTREAM


@pytest.mark.parametrize("word", sorted(set(UPSTREAM) - {"-h", "--help"}))
@pytest.mark.parametrize("module", MODULES)
def test_flag_is_upstreams(module, word):
    ours = build_parser(module)._option_string_actions.get(word)
    theirs = UPSTREAM[word]
    assert ours is not None, f"{module} lacks {word}"
    allowed = EXCEPTIONS.get(theirs.dest, {})
    assert type(ours) is type(theirs)
    for name in ("dest", "nargs", "const", "type", "choices", "required", "default"):
        if theirs.dest == "logger.wandb.run_name" and name == "default":
            assert re.fullmatch(r"exp_\d{4}T\d\d:\d\d", ours.default)
        else:
            assert getattr(ours, name) == allowed.get(name, getattr(theirs, name)), name


@pytest.mark.parametrize("module", MODULES)
def test_help_lists_every_flag(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(module, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in UPSTREAM if word not in text] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_flag_has_help(module):
    assert [action.dest for action in build_parser(module)._actions if not action.help] == []


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("word", ["--data.datasett", "--data.datas", "--adam.l", "--model.bet", "--beta", "stray"])
def test_unknown_and_abbreviated_flags_are_errors(module, word):
    with pytest.raises(UserError) as error:
        parse(module, [word, "1"] if word != "stray" else [word])
    assert word.lstrip("-") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("module", MODULES)
def test_of_a_repeated_flag_the_last_wins(module):
    args = parse(module, ["--adam.lr", "1", "--train.batch_size", "2", "--adam.lr", "3", "--train.batch_size=4"])
    assert args.adam.lr == 3 and args.train.batch_size == 4
    args = parse(module, ["--muon.no_nesterov", "--ds.lora.target_modules", "a", "b", "--adam.betas", "0.1", "0.2"])
    assert args.muon.nesterov is False and args.ds.lora.target_modules == ["a", "b"] and args.adam.betas == [0.1, 0.2]


def test_args_json_holds_every_flag(small_run, tmp_path):
    words = small_run("out", **{"data.step_separator": "\\n", "ckpt.path": tmp_path / "elsewhere"})
    train("train_pipa", *words)
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    flags = {action.dest for action in build_parser("train_pipa")._actions} - {"help", "config"}
    assert {name for name in record if not name.startswith("resolved.")} == flags
    defaults = build_parser("train_pipa").parse_args([])
    # Not given: as upstream has it, whatever this machine made of it.
    assert (
        record["ds.attn_implementation"] == "flash_attention_2" and record["resolved.ds.attn_implementation"] == "sdpa"
    )
    assert record["model.beta"] == 0.1 and record["ckpt.max_mem"] == 100000000
    for name in ("adam.eps", "lr_scheduler", "logger.wandb.project", "ds.lora.target_modules"):
        assert record[name] == getattr(defaults, name)
    assert record["adam.lr"] == 0.01 and record["adam.betas"] == [0.9, 0.95] and record["data.step_separator"] == "\n"
    assert record["resolved.world_size"] == 1 and record["resolved.total_steps"] == 6
    assert record["resolved.ckpt.path"] == str(tmp_path / "elsewhere") == record["ckpt.path"]


def test_upstreams_own_command_trains(tiny_models, tmp_path):
    """OpenRLHF's published DPO command with module, model and data changed."""
    from tiny import write_jsonl

    def messages(answer):
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]

    data = write_jsonl(
        tmp_path / "pairs.jsonl", [{"chosen": messages(f"yes {n}"), "rejected": messages("no")} for n in range(3)]
    )
    command = f"""
        --ckpt.output_dir {tmp_path}/out --ckpt.save_steps -1 --logger.logging_steps 1 --eval.steps -1
        --train.batch_size 256 --train.micro_batch_size 1 --model.model_name_or_path {tiny_models}/policy
        --ds.param_dtype bf16 --train.max_epochs 1 --data.max_len 8192 --ds.zero_stage 3 --adam.lr 5e-7
        --model.beta 0.1 --data.dataset {data} --data.apply_chat_template --data.chosen_key chosen
        --data.rejected_key rejected --ds.attn_implementation flash_attention_2 --ckpt.load_enable
        --ds.packing_samples --model.gradient_checkpointing_enable --prior.cache_dir {tmp_path}/cache
    """
    for module in ("train_pipa", "train_dpo"):
        rows = train(module, *command.replace("/out", f"/{module}").split())
        assert len(rows) == 1 and rows[0]["grad_norm"] > 0
