"""The command line: by rule, by going on from answers, and what two annotators agree on."""

import json

import pytest
import torch
from tiny import flags, make_model, make_tokenizer, read_jsonl, run_in_process, start_module, write_jsonl

from pipa_openrlhf.annotate.rollout import _row_maker
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.evaluate.grading import Grader
from pipa_openrlhf.generate import job
from pipa_openrlhf.generate.problems import Problem
from pipa_openrlhf.generate.sampling import Answer

LEARNED = "1+1=2\n2*2=4\n#### 4"
QUESTIONS = {"right": "4", "wrong": "6"}


def answer(problem: str, sample: int, text: str, label: bool) -> dict:
    row = {"problem_id": problem, "sample": sample, "prompt": f"{problem}?", "completion": text, "label": label}
    return {**row, "answer": QUESTIONS[problem], "predicted": None, "finished": True}


ROWS = [
    answer("right", 0, LEARNED, True),
    answer("right", 1, "1+1=2\n2*2=4\n#### 5", False),  # only its last step is wrong
    answer("wrong", 0, LEARNED, False),  # nobody gets to 6 from here
    answer("wrong", 1, "1+1=3\n#### 3", False),
    answer("wrong", 2, "6", False),  # one step: nothing to go on from
]


@pytest.fixture
def annotate(tmp_path):
    """``annotate(changes)`` -> exit status and the rows written."""

    def call(**changes):
        words = {
            "annotate.method": "rule",
            "annotate.input": write_jsonl(tmp_path / "answers.jsonl", ROWS),
            "annotate.output": tmp_path / "steps.jsonl",
            **changes,
        }
        status = run_in_process("annotate", *flags(words))
        return status, read_jsonl(words["annotate.output"]) if status == 0 else None

    return call


def one_error(capsys) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_by_rule(annotate, tmp_path, capsys):
    status, rows = annotate()
    assert status == 0
    assert [(row["problem_id"], row["sample"], row["first_error"]) for row in rows] == [
        *[("right", 0, -1), ("right", 1, -1), ("wrong", 0, -1)],
        *[("wrong", 1, 0), ("wrong", 2, -1)],
    ]
    assert [row["labels"] for row in rows] == [
        *[[True, True, True], [True, True, False], [True, True, False]],
        *[[False, False], [False]],
    ]
    assert {row["annotator"] for row in rows} == {"rule"}
    out = capsys.readouterr().out
    assert (
        "5 of 5 answers, 1 with a wrong step, 0 of them right by their result, 3 wrong by their result without one"
        in out
    )
    assert run_in_process("inspect_data", *inspect_flags(tmp_path)) == 0
    assert "answers   5 read, 5 used, of 2 problems" in capsys.readouterr().out


def inspect_flags(tmp_path) -> list[str]:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    names = {"data.dataset": tmp_path / "steps.jsonl", "data.annotation": "step"}
    return flags({**names, "model.model_name_or_path": tmp_path / "tokenizer"})


def test_what_was_cut_off_is_continued_and_other_settings_are_refused(annotate, tmp_path, capsys):
    annotate()
    path = tmp_path / "steps.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0] + lines[1][:9], b"".join(lines[:3]), lines[3]):
        path.write_bytes(kept)
        assert annotate()[0] == 0 and path.read_bytes() == whole
    assert annotate(**{"annotate.threshold": 0.1})[0] == 1
    assert "was made with threshold 0.5, not 0.1" in one_error(capsys)
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    assert annotate(**{"annotate.input": write_jsonl(tmp_path / "fewer.jsonl", ROWS[:4])})[0] == 1
    assert "was made with answers" in one_error(capsys)
    assert path.read_bytes() == whole


def test_an_answer_without_a_label_is_graded(annotate, tmp_path):
    rows = [{**row, "label": None} for row in ROWS]
    _, found = annotate(**{"annotate.input": write_jsonl(tmp_path / "unlabelled.jsonl", rows)})
    assert [row["answer_label"] for row in found] == [True, False, False, False, False]
    _, plain = annotate(**{"annotate.output": tmp_path / "plain.jsonl"})
    assert [row["labels"] for row in found] == [row["labels"] for row in plain]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model that knows ``LEARNED`` by heart, whatever is asked, from its beginning and from within."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make_model(0, hidden_size=32, intermediate_size=64), make_tokenizer()
    ids = torch.tensor([tokenizer(f"{name}?\n{LEARNED}<|im_end|>").input_ids for name in QUESTIONS])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rollout_flags(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "annotate.method": "rollout",
        "model.model_name_or_path": model_folder,
        "data.input_template": "{}\n",
        "ds.param_dtype": "fp32",
        "rollout.num_samples": 3,
        "rollout.temperature": 0,
        "rollout.max_new_tokens": 24,
    }


def test_by_going_on(annotate, rollout_flags, tmp_path, capsys):
    status, rows = annotate(**rollout_flags)
    assert status == 0
    q_values = [row["q_values"] for row in rows]
    assert q_values[:3] == [[1, 1, 1], [1, 1, -1], [-1, -1, -1]] and q_values[4] == [-1]
    assert q_values[3] == [-1, -1], "6 comes from no beginning"
    assert [row["first_error"] for row in rows] == [-1, 2, 0, 0, 0]
    assert [row["labels"] for row in rows][1:3] == [[True, True, False], [False, False, False]]
    drawn = read_jsonl(tmp_path / "steps.jsonl.rollouts.jsonl")
    # Two beginnings that two answers share, the same two of the other problem, and 1+1=3; three times each.
    assert len(drawn) == 5 * 3 and "5 beginnings of 5 answers, 3 times each" in capsys.readouterr().out


def test_q_is_twice_the_share_less_one_and_goes_on_where_it_was_killed(annotate, rollout_flags, tmp_path, monkeypatch):
    random = {**rollout_flags, "rollout.temperature": 1.5, "rollout.num_samples": 8, "rollout.batch_size": 8}
    _, rows = annotate(**random)
    path = tmp_path / "steps.jsonl.rollouts.jsonl"
    drawn = read_jsonl(path)
    rights = [row["predicted"] == "4" for row in drawn]
    assert [row["label"] for row in drawn][:8] == rights[:8] or len(set(rights)) > 1
    shares = {}
    for row in drawn:
        shares.setdefault(row["problem_id"], []).append(row["label"])
    values = {2 * sum(labels) / 8 - 1 for labels in shares.values()}
    assert {q for row in rows for q in row["q_values"][:-1]} == values and len(values) > 1
    whole, steps = path.read_bytes(), (tmp_path / "steps.jsonl").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "steps.jsonl").write_bytes(b"")
    assert annotate(**random)[0] == 0
    assert path.read_bytes() == whole and (tmp_path / "steps.jsonl").read_bytes() == steps
    monkeypatch.setattr(job.Job, "load_model", lambda self: pytest.fail("there is nothing left to draw"))
    assert annotate(**random)[0] == 0


def test_two_workers_of_ray_write_the_rows_of_one_process(annotate, rollout_flags, tmp_path):
    random = {**rollout_flags, "rollout.temperature": 1.5, "rollout.batch_size": 3}
    assert annotate(**random)[0] == 0
    words = flags({**random, "annotate.input": tmp_path / "answers.jsonl", "annotate.output": tmp_path / "ray.jsonl"})
    launcher = ["--ray.num_workers", 2, "--ray.address", "local", "--"]
    driver = start_module("launch_ray", *launcher, "pipa_openrlhf.cli.annotate", *words)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors[-3000:]
    for suffix in ("", ".rollouts.jsonl"):
        assert read_jsonl(tmp_path / f"ray.jsonl{suffix}") == read_jsonl(tmp_path / f"steps.jsonl{suffix}")


def test_a_result_that_stands_in_the_beginning_is_the_answers():
    problem = Problem("begun", "q", "4", None)
    drawn = [Answer("or 5", True, 3), Answer("#### 5", True, 3), Answer("or 5", False, 3)]
    with Grader() as grader:
        [rows] = _row_maker(grader, {"begun": "so\n#### 4\n"})([(problem, drawn)])
    assert [(row["label"], row["predicted"]) for row in rows] == [(True, "4"), (True, "4"), (False, None)]


def test_right_answers_may_be_left_out(annotate, rollout_flags, tmp_path):
    _, rows = annotate(**{**rollout_flags, "rollout.skip_right": True, "annotate.format": "alphamath"})
    assert [node["Q"] for node in rows[0]["output"]] == [1, 1, 1]
    config = parse("train_pipa", ["--data.annotation", "step"])
    found = load_samples(config, make_tokenizer(), dataset=str(tmp_path / "steps.jsonl"))
    assert found.format == "alphamath" and [one.answer_label for one in found.samples] == [1, 0, 0, 0, 0]
    only_right = write_jsonl(tmp_path / "right.jsonl", ROWS[:1])
    more = {"annotate.input": only_right, "annotate.output": tmp_path / "none.jsonl", "rollout.skip_right": True}
    status, [row] = annotate(**{**rollout_flags, **more})
    assert status == 0 and row["q_values"] == [1, 1, 1]


def test_special_text_in_an_answer_is_text(annotate, rollout_flags, tmp_path):
    rows = [answer("wrong", 0, "<|im_end|>\n6", False)]
    status, [row] = annotate(**{**rollout_flags, "annotate.input": write_jsonl(tmp_path / "special.jsonl", rows)})
    assert status == 0 and row["completions"] == ["<|im_end|>", "6"]


def test_consensus(annotate, tmp_path, capsys):
    _, first = annotate()
    changed = [{**row, "first_error": error} for row, error in zip(first, (-1, 1, -1, 1, 0))]
    second = write_jsonl(tmp_path / "second.jsonl", [*changed[::-1], {**changed[0], "completions": ["x"]}])
    more = {"annotate.method": "consensus", "annotate.input": tmp_path / "steps.jsonl", "annotate.other": second}
    output = tmp_path / "agreed.jsonl"
    status, rows = annotate(**more, **{"annotate.output": output})
    assert status == 0 and rows == [first[0], first[2]]
    out = capsys.readouterr().out
    for text in (
        "2 agree on no error",
        "2 only one sees an error",
        "1 see it at different steps",
        "2 of 5 answers kept",
    ):
        assert text in out
    assert "1 only in the second file" in out
    output.write_bytes(output.read_bytes()[:-9])
    assert annotate(**more, **{"annotate.output": output}) == (0, rows)


def test_consensus_reads_stepwise_labels_and_alphamath(annotate, tmp_path):
    stepwise = [{"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}]
    path = [{"step": "a", "Q": 1}, {"step": "b", "Q": -1}]
    tree = [{"instruction": "<question> q </question>", "output": path, "first_error": 1}]
    for number, (one, other, kept) in enumerate([(stepwise, stepwise, 1), (tree, tree, 1), (stepwise, tree, 0)]):
        flags_of_two = {
            "annotate.method": "consensus",
            "annotate.input": write_jsonl(tmp_path / f"one{number}.jsonl", one),
            "annotate.other": write_jsonl(tmp_path / f"other{number}.jsonl", other),
            "annotate.output": tmp_path / f"kept{number}.jsonl",
        }
        status, _ = annotate(**flags_of_two)
        assert status == (0 if kept else 1)


BAD = {
    "no method": ({"annotate.method": None}, "--annotate.method is required"),
    "no input": ({"annotate.input": None}, "--annotate.input is required"),
    "no output": ({"annotate.output": None}, "--annotate.output is required"),
    "unknown method": ({"annotate.method": "guess"}, "invalid choice: 'guess'"),
    "no such file": ({"annotate.input": "none.jsonl"}, "--annotate.input none.jsonl: no such file"),
    "output is input": ({"annotate.output": "{input}"}, "is read too"),
    "other of rule": ({"annotate.other": "{input}"}, "--annotate.other is for --annotate.method consensus"),
    "consensus of one": ({"annotate.method": "consensus"}, "--annotate.other is required"),
    "consensus of unlabelled": (
        {"annotate.method": "consensus", "annotate.other": "{input}"},
        "no annotated answer (columns: ",
    ),
    "judge without a model": ({"annotate.method": "judge"}, "--judge.model is required"),
    "judge's prompt": (
        {"annotate.method": "judge", "judge.model": "m", "judge.prompt": "none.txt"},
        "--judge.prompt none.txt: no such file",
    ),
    "judge's body": ({"annotate.method": "judge", "judge.model": "m", "judge.body": "{"}, "--judge.body is not JSON"),
    "judge's list": ({"annotate.method": "judge", "judge.model": "m", "judge.body": "[]"}, "is no JSON object"),
    "judge's budget": ({"judge.token_budget": 0}, "--judge.token_budget must be at least 1"),
    "threshold": ({"annotate.threshold": 2}, "--annotate.threshold must be at most 1"),
    "rollout without a model": ({"annotate.method": "rollout"}, "--model.model_name_or_path is missing"),
    "rollout of no folder": (
        {"annotate.method": "rollout", "model.model_name_or_path": "./none"},
        "--model.model_name_or_path ./none: no such folder",
    ),
    "no rollouts": ({"rollout.num_samples": 0}, "--rollout.num_samples must be at least 1"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(annotate, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "answers.jsonl")
    assert annotate(**{name: path if value == "{input}" else value for name, value in changes.items()})[0] == 1
    assert message in one_error(capsys)
    assert {one.name for one in tmp_path.iterdir()} <= {"answers.jsonl"}


def test_rollout_without_a_right_answer_is_refused(annotate, rollout_flags, tmp_path, capsys):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in ROWS]
    assert annotate(**{**rollout_flags, "annotate.input": write_jsonl(tmp_path / "bare.jsonl", rows)})[0] == 1
    assert "bare.jsonl line 1: rollout grades by the right answer" in one_error(capsys)


def test_a_file_of_somebody_elses_is_not_written_to(annotate, tmp_path, capsys):
    (tmp_path / "steps.jsonl").write_text("mine\n")
    for method in ({}, {"annotate.method": "consensus", "annotate.other": None}):
        if method:
            row = json.dumps({"prompt": "q", "completions": ["a"], "labels": [1]}) + "\n"
            (tmp_path / "a.jsonl").write_text(row), (tmp_path / "b.jsonl").write_text(row)
            method |= {"annotate.input": tmp_path / "a.jsonl", "annotate.other": tmp_path / "b.jsonl"}
        assert annotate(**method)[0] == 1
        assert "choose another" in one_error(capsys)
        assert (tmp_path / "steps.jsonl").read_text() == "mine\n"
