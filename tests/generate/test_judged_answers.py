"""Commands that judge answers by a value head, on a tiny model that has learned one answer by heart."""

import json
import shutil

import pytest
import torch
from test_commands import LEARNED, call, flags, model_folder, read  # noqa: F401  # fixtures

from pipa_openrlhf.cli import evaluate
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.model.loading import load_tokenizer
from pipa_openrlhf.model.policy import ValueHead, save_value_head
from pipa_openrlhf.model.value_model import head_digest, load_value_model

STEPS = ["1 + 1 = 2\n", "2 * 2 = 4\n", "#### 4"]


def write_head(folder, seed: int = 0) -> None:
    torch.manual_seed(seed)
    head = ValueHead(32, 8, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    save_value_head(str(folder), head.state_dict())


@pytest.fixture
def judged(flags, model_folder, tmp_path):  # noqa: F811
    """Flags of an evaluation by search, of a model with a value head beside it."""
    folder = tmp_path / "exported"
    shutil.copytree(model_folder, folder)
    write_head(folder)
    return flags | {
        "--model.model_name_or_path": str(folder),
        "--evaluate.output_dir": str(tmp_path / "evaluation"),
        "--evaluate.max_new_tokens": "32",
        "--evaluate.decode": "sbs",
        "--sbs.tree_dir": str(tmp_path / "trees"),
    }


def values_by_hand(folder: str, rows: list[dict]) -> list[float]:
    tokenizer = load_tokenizer(folder)
    texts = [f"{row['question']}\n{row['completion']}" for row in rows]
    return load_value_model(folder, torch.float32).values([tokenizer(text).input_ids for text in texts])


def test_search_writes_results_and_trees(judged, tmp_path):
    assert call(evaluate, judged | {"--sbs.temperature": "0.1"}) == 0
    rows = read(tmp_path / "evaluation" / "results.jsonl")
    assert {row["problem_id"]: row["right"] for row in rows} == {"right": True, "wrong": False}
    assert [row["completion"] for row in rows] == [LEARNED] * 2
    folder = judged["--model.model_name_or_path"]
    assert [row["value"] for row in rows] == pytest.approx(values_by_hand(folder, rows), abs=1e-5)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert (summary["beams"], summary["samples"], summary["max_depth"]) == (3, 1, 10)
    assert summary["value_head"] == head_digest(folder)

    tree = json.loads((tmp_path / "trees" / "wrong.json").read_text())
    assert (tree["question"], tree["gold"], tree["prompt"]) == ("wrong?", "6", "wrong?\n")
    path = [tree["nodes"][tree["answer"]]]
    while path[0]["parent"]:
        path.insert(0, tree["nodes"][path[0]["parent"]])
    assert [node["text"] for node in path] == STEPS
    assert [node["fate"] for node in path] == ["kept", "kept", "finished"]


def test_a_search_goes_on_where_it_was_and_is_no_other_one(judged, tmp_path, capsys):
    judged = judged | {"--sbs.temperature": "2", "--sbs.samples": "2", "--evaluate.batch_size": "1"}
    assert call(evaluate, judged) == 0
    path = tmp_path / "evaluation" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 20])
    assert call(evaluate, judged) == 0
    assert path.read_bytes() == whole
    capsys.readouterr()
    for change, words in (
        ({"--sbs.beams": "2"}, "beams 3, not 2"),
        ({"--sbs.max_depth": "9"}, "max_depth 10, not 9"),
        ({"--sbs.value": "logprob"}, "value head, not logprob"),
        ({"--sbs.step_end": "="}, "step_ends"),
    ):
        assert call(evaluate, judged | change) == 1
        assert words in capsys.readouterr().err
    assert call(evaluate, judged | {"--sbs.tree_dir": str(tmp_path / "elsewhere")}) == 0
    write_head(judged["--model.model_name_or_path"], seed=1)
    capsys.readouterr()
    assert call(evaluate, judged) == 1
    assert "value_head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ends, steps",
    [
        (["="], ["1 + 1 =", " 2\n2 * 2 =", " 4\n#### 4"]),
        (["+", r"4\n#"], ["1 +", " 1 = 2\n2 * 2 = 4\n#", "### 4"]),
        # A line end with nothing before it is the beginning of a step.
        (["2", r"\n"], ["1 + 1 = 2", "\n2", " * 2", " = 4\n", "#### 4"]),
    ],
)
def test_what_ends_a_step(judged, model_folder, tmp_path, ends, steps):  # noqa: F811
    plain = judged | {"--model.model_name_or_path": model_folder, "--sbs.value": "none", "--sbs.temperature": "0"}
    assert call(evaluate, plain, "--sbs.step_end", *ends) == 0
    tree = json.loads((tmp_path / "trees" / "right.json").read_text())
    assert [node["text"] for node in tree["nodes"] if node["fate"] in ("kept", "finished")] == steps


def test_steps_end_as_the_style_of_the_prompt_has_them():
    assert parse("evaluate", []).step_ends == ("\n",)
    assert parse("evaluate", ["--prompt.style", "alphamath"]).step_ends == ("</code>", "</step>")
    assert parse("evaluate", ["--prompt.style", "alphamath", "--sbs.step_end", r"\n"]).step_ends == ("\n",)


def test_sampled_answers_are_chosen_and_weighed(judged, tmp_path):
    folder = judged["--model.model_name_or_path"]
    judged |= {"--evaluate.value_head": folder, "--evaluate.decode": "sample", "--evaluate.num_answers": "3"}
    assert call(evaluate, judged) == 0
    rows = read(tmp_path / "evaluation" / "results.jsonl")
    assert [row["value"] for row in rows] == pytest.approx(values_by_hand(folder, rows), abs=1e-5)
    assert len({row["value"] for row in rows}) > 1
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert {"maj@3", "weighted maj@3", "best-of-3"} <= {one["score"] for one in summary["scores"]}
    assert summary["value_head"] == head_digest(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--model.model_name_or_path": "plain"}, "no value head in"),
        ({"--evaluate.value_head": "/nowhere"}, "no value head in /nowhere"),
        ({"--evaluate.value_head": "exported", "--sbs.value": "none"}, "--evaluate.value_head is for"),
        ({"--evaluate.value_head": "exported", "--evaluate.decode": "greedy"}, "--evaluate.value_head is for"),
        ({"--sbs.step_end": ""}, "--sbs.step_end"),
        ({"--sbs.beams": "0"}, "--sbs.beams must be at least 1"),
        ({"--sbs.temperature": "-1"}, "--sbs.temperature"),
    ],
)
def test_refusals_are_one_line(judged, model_folder, change, words, capsys):  # noqa: F811
    places = {"plain": model_folder, "exported": judged["--model.model_name_or_path"]}
    assert call(evaluate, judged | {name: places.get(value, value) for name, value in change.items()}) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
