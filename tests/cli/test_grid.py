"""The YAML file of a sweep: its trials, and the line that a user reads when something is wrong with it."""

import pytest
import yaml
from tiny import write_jsonl

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.cli.grid import read_grid
from pipa_openrlhf.errors import UserError


@pytest.fixture
def grid(tiny_models, tmp_path):
    """``grid(train={...}, grid={...})`` -> the path of a file, sound but for what is given; None: left out."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "completion": "2", "label": True}])
    problems = write_jsonl(tmp_path / "problems.jsonl", [{"question": "1+1?", "answer": "2"}])
    sound = {
        "train": {
            "model.model_name_or_path": str(tiny_models / "policy"),
            "data": {"dataset": data, "input_template": "Q {}\n"},
            "ds.param_dtype": "fp32",
            "train.seed": 7,
        },
        "grid": {
            "adam.lr": [1.0e-3, "1e-2"],
            "objective": {"pipa-n": {"objective": "pipa", "pipa": {"variant": "n"}}, "sft": {"objective": "sft"}},
        },
        "evaluate": {"problems.file": problems, "evaluate.max_new_tokens": 4},
    }

    def make(**parts) -> str:
        path = tmp_path / "grid.yaml"
        content = {name: part for name, part in {**sound, **parts}.items() if part is not None}
        # What is set beside the sound settings, not in their place.
        for name in ("train", "evaluate"):
            if isinstance(content.get(name), dict) and content[name] and content[name] is not sound[name]:
                content[name] = {**sound[name], **content[name]}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return make


def test_every_point_of_the_grid_is_a_trial(grid):
    trials = read_grid(grid())
    assert [trial.point for trial in trials] == [
        {"adam.lr": "0.001", "objective": "pipa-n"},
        {"adam.lr": "0.001", "objective": "sft"},
        {"adam.lr": "1e-2", "objective": "pipa-n"},
        {"adam.lr": "1e-2", "objective": "sft"},
    ]
    assert [trial.config.adam.lr for trial in trials] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert [trial.config.objective.flag_group for trial in trials] == ["pipa", "sft", "pipa", "sft"]
    assert trials[0].config.objective.variant == "n"
    assert all(trial.config.ckpt.load_enable and trial.config.train.seed == 7 for trial in trials)
    assert trials[0].name == "adam.lr 0.001; objective pipa-n"


def test_an_evaluation_has_the_templates_of_its_training_unless_told_otherwise(grid):
    evaluation = read_grid(grid())[0].evaluation
    assert evaluation.data.input_template == "Q {}\n" and evaluation.ds.param_dtype == "fp32"
    assert evaluation.train.seed == parse("evaluate", []).train.seed  # one for all trials
    other = read_grid(grid(evaluate={"data.input_template": "A {}\n", "ds.param_dtype": "bf16"}))[0].evaluation
    assert other.data.input_template == "A {}\n" and other.ds.param_dtype == "bf16"


def test_settings_that_one_objective_alone_has_are_left_out_of_the_others(grid):
    """SFT has no prior."""
    trials = read_grid(grid(train={"prior.cache_dir": "/cache"}))
    assert trials[0].config.prior.cache_dir == "/cache" and trials[1].config.objective.flag_group == "sft"


def test_an_evaluation_is_known_by_its_settings_and_the_text_of_its_problems(grid, tmp_path):
    first, copy = (read_grid(grid())[0] for _ in range(2))
    assert first.evaluation_id() == copy.evaluation_id()
    longer = read_grid(grid(evaluate={"evaluate.max_new_tokens": 5}))[0]
    write_jsonl(tmp_path / "moved.jsonl", [{"question": "1+1?", "answer": "2"}])
    moved = read_grid(grid(evaluate={"problems.file": str(tmp_path / "moved.jsonl")}))[0]
    write_jsonl(tmp_path / "moved.jsonl", [{"question": "1+2?", "answer": "3"}])
    assert first.evaluation_id() != longer.evaluation_id() and first.evaluation_id() != moved.evaluation_id()
    write_jsonl(tmp_path / "moved.jsonl", [{"question": "1+1?", "answer": "2"}])
    assert first.evaluation_id() == moved.evaluation_id()


SEEDS = {"train.seed": [1, 2]}
BAD = {
    "another part": ({"trials": {"a": 1}}, "trials is no part of a sweep; there are train, grid, evaluate"),
    "no training": ({"train": None}, "train is missing or empty"),
    "no grid": ({"grid": None}, "grid is missing or empty"),
    "an empty grid": ({"grid": {}}, "grid is missing or empty"),
    "a grid of words": ({"grid": "adam.lr"}, "grid is missing or empty"),
    "no evaluation": ({"evaluate": None}, "evaluate is missing or empty"),
    "no problems": ({"evaluate": {"problems.file": None}}, "--problems.file is required"),
    "an unknown flag": ({"train": {"adam.rate": 1}}, "adam.rate is no setting of this command"),
    "an unknown flag of the evaluation": ({"evaluate": {"evaluate.speed": 1}}, "evaluate.speed is no setting"),
    "an unknown flag of the grid": ({"grid": {"adam.rate": [1, 2]}}, "adam.rate is no setting of this command"),
    "an unknown flag below a name": ({"grid": {"data": {"x": {"data.set": "y"}}}}, "data.set is no setting"),
    "a name that is a number": ({"train": {2: 1}}, "2 is no setting of this command"),
    "an axis without a list": ({"grid": {"adam.lr": 0.1}}, "grid: adam.lr: write a list of values"),
    "an axis without values": ({"grid": {"adam.lr": []}}, "grid: adam.lr: write a list of values"),
    "an axis with nothing in it": ({"grid": {"adam.lr": [None]}}, "grid: adam.lr: None is empty"),
    "a name without flags": ({"grid": {"data": {"steps": None}}}, "grid: data: steps is empty"),
    "a value twice": ({"grid": {"adam.lr": [0.1, 0.1]}}, "grid: adam.lr: 0.1 stands there twice"),
    "a value twice, written otherwise": ({"grid": {"adam.lr": [0.001, "1e-3"]}}, "two trials are the same"),
    "what changes nothing that is trained": ({"grid": {"ds.zero_stage": [0, 2]}}, "two trials are the same"),
    "a wrong type": ({"grid": {"adam.lr": ["fast", 0.1]}}, "argument --adam.lr: invalid float value: 'fast'"),
    "a list for one value": ({"grid": {"adam.lr": [[0.1, 0.2]]}}, "unrecognized arguments: 0.2"),
    "out of bounds": ({"grid": {"adam.lr": [-1, 0.1]}}, "--adam.lr must not be negative, got -1"),
    "not a number": ({"grid": {"adam.lr": [float("nan"), 0.1]}}, "--adam.lr must be a finite number"),
    "not one of the choices": ({"grid": {"pipa.variant": ["x"]}}, "argument --pipa.variant: invalid choice"),
    "a switch with a word": ({"train": {"ckpt.save_hf": "yes"}}, "ckpt.save_hf is true or false, got 'yes'"),
    "an unknown objective": ({"grid": {"objective": ["pipa", "ppo"]}}, "--objective ppo is not one of"),
    "one flag in two axes": (
        {"grid": {"train.seed": [1, 2], "data": {"a": {"train.seed": 3}}}, "train": {"train.seed": None}},
        "train.seed is set by",
    ),
    "one flag shared and in the grid": ({"grid": SEEDS}, "train.seed is set by train too"),
    "a cache a trial": ({"grid": {"prior.cache_dir": ["/a", "/b"]}}, "prior.cache_dir is one for all trials"),
    "a folder of one's own": ({"train": {"ckpt.output_dir": "/x"}}, "ckpt.output_dir is set by the sweep"),
    "a folder in the grid": ({"grid": {"ckpt.path": ["/x", "/y"]}}, "ckpt.path is set by the sweep"),
    "overwriting": ({"train": {"ckpt": {"overwrite": True}}}, "ckpt.overwrite is set by the sweep"),
    "a model to evaluate": ({"evaluate": {"model.model_name_or_path": "/x"}}, "is set by the sweep"),
    "no such model": ({"train": {"model.model_name_or_path": "/no/such"}}, "--model.model_name_or_path /no/such"),
    "flags that do not fit each other": ({"train": {"ckpt.merge_lora": True}}, "--ckpt.merge_lora needs LoRA"),
}


@pytest.mark.parametrize("parts, line", BAD.values(), ids=BAD)
def test_what_is_wrong_is_named_with_the_file(grid, parts, line):
    path = grid(**parts)
    with pytest.raises(UserError) as error:
        read_grid(path)
    message = str(error.value)
    assert line in message and "\n" not in message
    assert f"--sweep.file {path}" in message or "(trial " in message


@pytest.mark.parametrize(
    "text, line", [("a: [", "line 1: not YAML"), ("", "holds no settings"), ("- a", "no settings")]
)
def test_a_file_that_holds_no_settings(tmp_path, text, line):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        read_grid(str(path))
    with pytest.raises(UserError, match="^--sweep.file /no/such.yaml: No such file"):
        read_grid("/no/such.yaml")
