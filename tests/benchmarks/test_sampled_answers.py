"""The answers that training is measured on, and the trees that paths come from."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import answers  # noqa: E402
import tree_search  # noqa: E402
from inputs import END, Problem, as_text, character_tokenizer  # noqa: E402


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """As sample_answers.sh leaves it: four word problems, and one with an empty answer."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["ab", "abc", "xy", "ab", "q", "r", "s", "t"]
    rows = [
        {"prompt": f"P{problem}", "completion": text, "label": number % 2 == 1}
        for problem in range(4)
        for number, text in enumerate(texts)
    ]
    empty = [{"prompt": "P5", "completion": tokenizer.eos_token if n == 3 else "z", "label": True} for n in range(8)]
    write(tmp_path / "words.jsonl", rows + empty)
    steps = [[{"step": "one", "Q": 0.5}, {"step": str(number), "Q": -1}] for number in range(8)]
    write(tmp_path / "trees.jsonl", [{"instruction": "<question> 1? </question>", "output": path} for path in steps])
    return tmp_path


def test_a_folder_without_answers_is_refused_with_the_command(tmp_path):
    with pytest.raises(SystemExit, match="bash benchmarks/sample_answers.sh"):
        answers.read_answers(tmp_path)


def test_tokens_are_those_of_the_text_numbered_anew(folder):
    words = answers.read_answers(folder)["words"]
    first = words.problems[0]
    # Newline ends a prompt; "P0\n" are the first three tokens, so 0, 1 and 2.
    assert first.prompt == [0, 1, 2]
    assert len(words.problems) == 4, "the problem with an empty answer is left out"
    right, wrong = first.completions[:4], first.completions[4:]
    assert [len(one) for one in right] == [3, 2, 1, 1] and [len(one) for one in wrong] == [2, 2, 1, 1]
    assert right[0][:2] == right[1] == wrong[0], "abc begins as ab does; right answers come first"
    assert words.problems[1].prompt == [0, first.prompt[1] + len({*"P0\nabcxyqrst"}) - 1, 2]


def test_paths_of_a_tree_are_in_its_layout(folder):
    (tree,) = answers.read_answers(folder)["trees"].problems
    assert len(tree.completions) == 8
    assert {len(path) for path in tree.completions} == {len("one\n0")}
    assert len({tuple(path[:4]) for path in tree.completions}) == 1, "they share their first step"


def test_tokens_left_by_hand():
    # Eos is a token of its own in each: 3 prompt + 2, 3, 2 answer + 3 eos.
    one = Problem([7, 8, 9], [[1, 2], [1, 2, 3], [4, 5]])
    every, prompts_once, distinct = answers.tokens_left([one])
    assert every == 3 * 3 + 7 + 3
    assert prompts_once == 3 + 7 + 3
    assert distinct == 3 + (3 + 2) + 3, "1 2 once"
    assert answers.tokens_left([Problem([7], [[1], [1]])]) == (6, 5, 3), "the same answer twice is one"


def test_more_tokens_than_the_models_know_are_refused(monkeypatch):
    monkeypatch.setattr(answers, "CHARACTERS", 3)
    numbering = answers.Numbering()
    assert numbering([50, 60, 50]) == [0, 1, 0]
    with pytest.raises(SystemExit, match="more than 3"):
        numbering([70, 80])


def test_text_of_tokens_is_read_as_those_tokens_beside_anything():
    tokenizer = character_tokenizer()
    ids = [0, 5, 9999, 32, 10]
    assert tokenizer(as_text(ids))["input_ids"] == ids
    assert tokenizer(as_text(ids) + tokenizer.eos_token)["input_ids"] == [*ids, END]


def test_a_search_goes_where_right_answers_are_and_leaves_what_is_spent():
    root = tree_search.Place()
    assert tree_search.select(root) is root
    tree_search.grow(root, ["1 + 1 = 2", "1 + 1 = 2", "1 + 1 = 3", "#### 9"], "2")
    good, bad, leaf = root.children
    assert (good.prior, bad.prior, leaf.is_right) == (0.5, 0.25, False)
    assert root.visits == 2 and root.total == -1, "the wrong leaf, and the growing itself"
    tree_search.grow(good, ["#### 2"], "2")
    assert good.value > 0 > leaf.value
    assert tree_search.select(root) is None, "all that follows from the best place is known"
    assert good.is_spent and tree_search.select(root) is bad
    assert [one.is_right for one in root.leaves()] == [True, False]


def test_steps_have_alphamaths_layout():
    code = "<code>\n```python\nprint(3 * 4)\n```\n</code>\n<output>\n12\n</output>"
    assert tree_search.as_step("3 * 4 = 11") == f"<step>\n<p>\n3 * 4 = 11\n</p>\n{code}\n</step>"
    assert tree_search.as_step("#### 11") == "<step>\n<p>\nFinal Answer: $11$\n</p>\n</step>"
    assert tree_search.as_step("well") == "<step>\n<p>\nwell\n</p>\n</step>"


def test_a_tree_gives_eight_paths_the_right_ones_first_or_none():
    root = tree_search.Place()
    tree_search.grow(root, [f"#### {number % 4}" + " " * number for number in range(12)], "0")
    rows = tree_search.rows_of(root, "1?", random.Random(0))
    values = [row["output"][-1]["Q"] for row in rows]
    assert values == [1.0] * 3 + [-1.0] * 5 and rows[0]["instruction"] == "<question> 1? </question>"
    small = tree_search.Place()
    tree_search.grow(small, [f"#### {number}" for number in range(7)], "0")
    assert tree_search.rows_of(small, "1?", random.Random(0)) == []


@pytest.mark.slow
def test_real_trainers_agree_on_sampled_answers_and_every_target_has_a_verdict(folder, tmp_path):
    """60 seconds."""
    result = tmp_path / "result.json"
    script = Path(answers.__file__).with_name("train_step.py")
    arms = ["--arms", "pipa,pipa_prompts,trl_kto,trl_dpo,openrlhf_dpo,swift_kto", "--only", "words"]
    command = [sys.executable, str(script), "--quick", "--repeats", "1", "--answers", str(folder), *arms]
    environment = {name: value for name, value in os.environ.items() if name != "SWIFT_PYTHON"}
    done = subprocess.run(
        [*command, "--output", str(result)], capture_output=True, text=True, timeout=1200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if " target " in line]
    assert len(lines) == 12 and all(line.split()[-1] in ("ok", "MISSED") for line in lines)
    words = json.loads(result.read_text())["sections"]["words"]
    assert list(words["failures"]) == ["swift_kto"] and "SWIFT_PYTHON" in words["failures"]["swift_kto"]
    flops = {arm: counted["round"]["flops"] for arm, counted in words["counted"].items()}
    assert flops["pipa"] < flops["pipa_prompts"] < flops["trl_dpo"] < flops["trl_kto"]
    assert words["log_prob_difference"] < 1e-4
