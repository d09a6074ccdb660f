"""A run from a YAML file, from its own config.yaml, and from Python: the same run as from the command line."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from tiny import read_jsonl, run_in_process

import pipa_openrlhf
from pipa_openrlhf.cli.flags import new_config, parse
from pipa_openrlhf.config import AdamConfig, ModelConfig, RunConfig, TrainConfig
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.dpo import DpoConfig
from pipa_openrlhf.objectives.kto import KtoConfig
from pipa_openrlhf.objectives.pipa import PipaConfig
from pipa_openrlhf.objectives.table import FAMILIES
from pipa_openrlhf.settings import flatten, to_yaml, updated
from pipa_openrlhf.training.model_card import command_of
from pipa_openrlhf.training.run import train


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = write(tmp_path / "run.yaml", "adam:\n  lr: 1e-3\n  betas: [0.5, 0.6]\npipa.clip_eps: 0.01\n")
    config = parse("train_pipa", ["--config", path, "--pipa.clip_eps", "0.1"])
    assert config.adam.lr == 1e-3 and list(config.adam.betas) == [0.5, 0.6] and config.objective.clip_eps == 0.1
    assert config.train.batch_size == TrainConfig().batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {"train.group_by_length": False, "muon.nesterov": False, "adam.betas": [0.1, 0.2]},
        {"data.step_separator": "; \n", "data.input_template": "Q: {}\n", "data.mask_tool_output": False},
        {"ds.lora.target_modules": ["q_proj", "v_proj"], "value.hidden_size": 8, "model.self_check": False},
        {"data.input_template": "--{}", "logger.wandb.run_name": "a: b # c"},
    ],
)
def test_a_config_comes_back_from_its_yaml(tmp_path, changes):
    # Local paths come back absolute.
    config = updated(new_config("train_pipa"), {"ckpt.output_dir": "/runs/one", **changes})
    assert flatten(parse("train_pipa", ["--config", write(tmp_path / "c.yaml", to_yaml(config))])) == flatten(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_any_objective_comes_back_from_its_yaml(tmp_path, family):
    config = updated(RunConfig(objective=FAMILIES[family]()), {"ckpt.output_dir": "/runs/one"})
    assert flatten(parse("train", ["--config", write(tmp_path / "c.yaml", to_yaml(config))])) == flatten(config)


@pytest.mark.parametrize("module", ["sample", "evaluate"])
def test_a_config_of_another_command_comes_back_from_its_yaml(tmp_path, module):
    config = updated(new_config(module), {"model.model_name_or_path": "/models/one"})
    assert flatten(parse(module, ["--config", write(tmp_path / "c.yaml", to_yaml(config))])) == flatten(config)


def test_a_flags_former_name_still_works(tmp_path):
    """On the command line, in a file by hand, and in the config.yaml that a run of an earlier version left."""
    assert parse("train_pipa", []).train.share_prefixes is True
    assert parse("train_pipa", ["--train.share_prompts", "false"]).train.share_prefixes is False
    assert parse("train_dpo", ["--train.share_prompts=false", "--train.share_prefixes=true"]).train.share_prefixes
    path = write(tmp_path / "run.yaml", "train.share_prompts: false\n")
    assert parse("train_pipa", ["--config", path]).train.share_prefixes is False
    assert parse("train_pipa", ["--config", path, "--train.share_prefixes", "true"]).train.share_prefixes is True
    earlier = to_yaml(new_config("train_pipa")).replace("share_prefixes: true", "share_prompts: false")
    config = parse("train_pipa", ["--config", write(tmp_path / "config.yaml", earlier)])
    assert config.train.share_prefixes is False and "share_prompts" not in to_yaml(config)


def test_paths_in_the_file_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    changes = {
        "ckpt.output_dir": "out",
        "ckpt.path": "not/there",
        "data.dataset": "rows.jsonl",
        "eval.dataset": "hub/rows",
    }
    written = yaml.safe_load(to_yaml(updated(new_config("train_pipa"), changes)))
    assert written["ckpt"]["output_dir"] == str(tmp_path / "out")
    assert written["ckpt"]["path"] == str(tmp_path / "not" / "there")
    assert written["data"]["dataset"] == str(tmp_path / "rows.jsonl") and written["eval"]["dataset"] == "hub/rows"


def test_the_file_names_the_objective(tmp_path):
    path = write(tmp_path / "c.yaml", to_yaml(RunConfig(objective=KtoConfig(step_loss="per_step"))))
    assert parse("train", ["--config", path]).objective == KtoConfig(step_loss="per_step")
    with pytest.raises(UserError, match="train_dpo trains dpo and the config file names kto: use cli.train"):
        parse("train_dpo", ["--config", path])


@pytest.mark.parametrize(
    "text, message",
    [
        ("adam.lrr: 1\n", "adam.lrr is no setting of this command"),
        ("- 1\n", "it holds no settings"),
        ("", "it holds no settings"),
        ("adam: [1\n", "line 2: not YAML"),
        ("adam.lr: fast\n", "--adam.lr"),
        ("ckpt.save_hf: maybe\n", "ckpt.save_hf is true or false, got 'maybe'"),
        ("objective: ppo\n", "--objective ppo is not one of pipa, dpo, kto, sft"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse("train", ["--config", write(tmp_path / "c.yaml", text)])
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        parse("train", ["--config", str(tmp_path / "absent.yaml")])


def test_a_run_writes_the_file_that_runs_it_again(small_run, tmp_path, capsys):
    words = small_run("out", **{"ckpt.save_steps": None, "logger.wandb.key": None})
    assert run_in_process("train_pipa", *words) == 0
    path = tmp_path / "out" / "config.yaml"
    written = yaml.safe_load(path.read_text())
    assert (
        written["objective"] == "pipa"
        and written["pipa"]["variant"] == "n"
        and written["logger"]["wandb"]["key"] is None
    )
    again = ["--config", path, "--ckpt.output_dir", tmp_path / "again"]
    assert run_in_process("train", *again) == 0
    first, second = (
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("out", "again")
    )
    assert first == second
    # The very same file finds its own finished run.
    assert run_in_process("train_pipa", "--config", path, "--ckpt.load_enable") == 0
    assert "already holds this run" in capsys.readouterr().out


def test_python_gives_the_run_of_the_command_line(small_run, tmp_path):
    words = small_run("out", **{"ckpt.save_steps": None})
    assert run_in_process("train_pipa", *words) == 0
    config = updated(parse("train_pipa", words), {"ckpt.output_dir": str(tmp_path / "python")})
    result = pipa_openrlhf.train(config)
    assert pipa_openrlhf.train(updated(config, {"ckpt.load_enable": True})).steps == result.steps, "called twice"
    rows = read_jsonl(tmp_path / "python" / "metrics.jsonl")
    assert result.steps == len(rows) and result.metrics == rows[-1] and result.output_dir == config.ckpt.output_dir
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]


@pytest.mark.parametrize(
    "config, flag",
    [
        (RunConfig(), "--model.model_name_or_path is missing"),
        (RunConfig(adam=AdamConfig(lr=-1.0)), "--adam.lr must not be negative, got -1.0"),
        (RunConfig(objective=DpoConfig(step_loss="l2")), "--dpo.step_loss l2 is not one of l1, l0"),
        (RunConfig(model=ModelConfig(model_name_or_path="./absent")), "--model.model_name_or_path ./absent"),
    ],
)
def test_python_is_checked_like_the_command_line(config, flag):
    with pytest.raises(UserError, match=flag):
        train(config)


@dataclass(frozen=True)
class OwnConfig(PipaConfig):
    """A family without an entry point of its own."""

    flag_group: ClassVar[str] = "own"
    module: ClassVar[str] = "train"


def test_a_family_without_an_entry_point_leaves_train_to_the_others(monkeypatch):
    monkeypatch.setitem(FAMILIES, "own", OwnConfig)
    assert parse("train", []).objective == PipaConfig()
    assert parse("train", ["--objective", "own", "--own.clip_eps", "0.5"]).objective == OwnConfig(clip_eps=0.5)
    assert "cli.train --objective own --own.clip_eps=0.5" in command_of(RunConfig(objective=OwnConfig(clip_eps=0.5)))
