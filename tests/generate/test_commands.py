"""The sample and evaluate command lines on a tiny model that has learned one worked answer by heart."""

import json

import pytest
import torch
from test_sampling import make_model, make_tokenizer

from pipa_openrlhf.cli import evaluate, sample
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.model.loading import load_tokenizer
from recipes.word_problems import label_steps

LEARNED = "1 + 1 = 2\n2 * 2 = 4\n#### 4"
RIGHT = {"question": "right?", "answer": "4", "steps": LEARNED.split("\n"), "problem_id": "right"}
WRONG = {"question": "wrong?", "answer": "6", "steps": ["1 + 1 = 2", "2 * 3 = 6", "#### 6"], "problem_id": "wrong"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make_model(), make_tokenizer()
    rows = [tokenizer(f"{row['question']}\n{LEARNED}<end>").input_ids for row in (RIGHT, WRONG)]
    ids = torch.tensor(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in (RIGHT, WRONG)))
    return {
        "--model.model_name_or_path": model_folder,
        "--problems.file": str(problems),
        "--data.input_template": "{}\n",
        "--ds.param_dtype": "fp32",
    }


def call(module, flags, *switches):
    name = module.__name__.rpartition(".")[2]
    return run(module.main, name, [word for pair in flags.items() for word in pair] + list(switches))


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.fixture
def sample_flags(flags, tmp_path):
    more = {"--sample.output": str(tmp_path / "out.jsonl"), "--sample.max_new_tokens": "32"}
    return flags | more | {"--sample.num_answers": "3", "--sample.batch_size": "3", "--sample.temperature": "0"}


def test_sample_labels_answers(sample_flags, capsys):
    assert call(sample, sample_flags) == 0
    rows = read(sample_flags["--sample.output"])
    assert [(row["problem_id"], row["sample"], row["label"]) for row in rows] == [
        (problem, number, problem == "right") for problem in ("right", "wrong") for number in range(3)
    ]
    assert {row["completion"] for row in rows} == {LEARNED}
    assert all(row["predicted"] == "4" and row["finished"] for row in rows)
    assert rows[0]["prompt"] == "right?"  # as in the problem file: training puts the template around it
    assert "6 answers to 2 problems: 3 right (50.0%), 3 wrong (0 stopped for length)" in capsys.readouterr().out


def test_sampled_answers_get_step_labels_and_training_reads_them(sample_flags, model_folder, tmp_path):
    assert call(sample, sample_flags) == 0
    path = str(tmp_path / "steps.jsonl")
    words = ["--answers", sample_flags["--sample.output"], "--problems", sample_flags["--problems.file"]]
    assert run(label_steps.main, label_steps.LabelConfig, [*words, "--output", path]) == 0
    labels = {row["problem_id"]: row["labels"] for row in read(path)}
    assert labels == {"right": [True, True, True], "wrong": [True, False, False]}
    assert all("\n".join(row["completions"]) == LEARNED for row in read(path))

    config = parse("train_pipa", ["--data.input_template", "{}\n", "--data.annotation", "step"])
    tokenizer = load_tokenizer(model_folder)
    loaded = load_samples(config, tokenizer, dataset=path)
    assert loaded.format == "stepwise" and not loaded.dropped and len(loaded.samples) == 6
    texts = {tokenizer.decode(one.input_ids) for one in loaded.samples}
    assert texts == {f"{question}\n{LEARNED}<end>" for question in ("right?", "wrong?")}


def test_words_of_sampled_answers_get_labels_and_training_reads_them(sample_flags, model_folder, tmp_path):
    assert call(sample, sample_flags) == 0
    path = str(tmp_path / "words.jsonl")
    words = ["--answers", sample_flags["--sample.output"], "--problems", sample_flags["--problems.file"]]
    assert run(label_steps.main, label_steps.LabelConfig, [*words, "--by", "word", "--output", path]) == 0
    right, wrong = ([row for row in read(path) if row["problem_id"] == name] for name in ("right", "wrong"))
    assert all(row["labels"] == [1] * 12 and row["answer_label"] is True for row in right)
    first_wrong = wrong[0]["labels"].index(-1)
    expected = [1] * first_wrong + [-1] + [0] * (11 - first_wrong)
    assert first_wrong > 5 and all(row["labels"] == expected and row["answer_label"] is False for row in wrong)

    config = parse(
        "train_pipa",
        ["--data.input_template", "{}\n", "--data.annotation", "step", "--data.step_separator", ""],
    )
    loaded = load_samples(config, load_tokenizer(model_folder), dataset=path)
    assert not loaded.dropped and len(loaded.samples) == 6
    masks = {one.answer_label: "".join(map(str, one.mask.tolist())) for one in loaded.samples}
    assert "0" not in masks[1] and masks[0].strip("0") == "1" * masks[0].count("1"), "nothing after the mistake"
    labels = {one.answer_label: one.labels[one.mask == 1].tolist() for one in loaded.samples}
    assert 0 not in labels[1] and labels[0][0] == 1 and labels[0][-1] == 0


def test_an_answer_stopped_for_length_is_wrong(sample_flags):
    short = len("1 + 1 = 2\n2 * 2 = 4\n#### 4")  # all of it, but for the end token
    assert call(sample, sample_flags | {"--sample.max_new_tokens": str(short)}) == 0
    rows = read(sample_flags["--sample.output"])
    assert {row["completion"] for row in rows} == {LEARNED}
    assert not any(row["label"] or row["finished"] for row in rows)


def test_an_empty_answer_is_trainable(sample_flags, model_folder, tmp_path):
    problems = [RIGHT | {"question": f"right?\n{LEARNED}"}]  # the model ends at once
    (tmp_path / "empty.jsonl").write_text(json.dumps(problems[0]) + "\n")
    more = {"--problems.file": str(tmp_path / "empty.jsonl"), "--data.input_template": "{}"}
    assert call(sample, sample_flags | more) == 0
    path = sample_flags["--sample.output"]
    assert read(path)[0]["completion"] == "<end>" and read(path)[0]["label"] is False
    loaded = load_samples(parse("train_pipa", []), load_tokenizer(model_folder), dataset=path)
    assert [one.labels.tolist() for one in loaded.samples] == [[0]] * 3


def test_sample_continues_where_it_was_killed(sample_flags, capsys):
    path = sample_flags["--sample.output"]
    drawn = sample_flags | {"--sample.temperature": "1.5"}
    assert call(sample, drawn) == 0
    whole = open(path, "rb").read()
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0] + lines[1][:20], b"".join(lines[:4]) + lines[4][:-1]):
        open(path, "wb").write(kept)
        assert call(sample, drawn) == 0
        assert open(path, "rb").read() == whole
    capsys.readouterr()
    assert call(sample, drawn) == 0  # complete: nothing to do but to say so
    assert "6 answers to 2 problems" in capsys.readouterr().out
    assert open(path, "rb").read() == whole


def test_sample_refuses_other_settings_in_the_same_file(sample_flags, capsys):
    assert call(sample, sample_flags) == 0
    capsys.readouterr()
    assert call(sample, sample_flags | {"--sample.temperature": "0.9"}) == 1
    error = capsys.readouterr().err
    assert "temperature 0.0, not 0.9" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--model.model_name_or_path": "/nowhere/at/all"}, "--model.model_name_or_path"),
        ({"--problems.file": "/nowhere.jsonl"}, "--problems.file"),
        ({"--sample.num_answers": "0"}, "--sample.num_answers must be at least 1"),
        ({"--problems.max": "0"}, "--problems.max must be at least 1"),
        ({"--sample.top_p": "1.5"}, "--sample.top_p"),
        ({"--sample.temperature": "-1"}, "--sample.temperature"),
        ({"--data.tokenizer_chat_template": "{{ x }}"}, "needs --data.apply_chat_template"),
        ({"--data.input_template": "{} {x}"}, "--data.input_template"),
    ],
)
def test_refusals_are_one_line(sample_flags, change, words, capsys):
    assert call(sample, sample_flags | change) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_step_labels_without_worked_steps_are_refused(sample_flags, tmp_path, capsys):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n')
    assert call(sample, sample_flags) == 0
    words = ["--answers", sample_flags["--sample.output"], "--problems", str(path), "--output", str(tmp_path / "out")]
    assert run(label_steps.main, label_steps.LabelConfig, words) == 1
    assert "`steps`" in capsys.readouterr().err


def test_evaluate_writes_results_and_summary_and_keeps_them(flags, tmp_path, capsys):
    folder = tmp_path / "evaluation"
    flags = flags | {"--evaluate.output_dir": str(folder), "--evaluate.max_new_tokens": "32"}
    assert call(evaluate, flags) == 0
    assert "accuracy 50.0% (1 of 2), 95 % interval 9.5% to 90.5%" in capsys.readouterr().out
    assert {row["problem_id"]: row["right"] for row in read(folder / "results.jsonl")} == {
        "right": True,
        "wrong": False,
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["right"], summary["n"], summary["no_answer"]) == (1, 2, 0)

    assert call(evaluate, flags) == 0  # finished: the same line again
    assert "accuracy 50.0% (1 of 2)" in capsys.readouterr().out
    assert call(evaluate, flags | {"--problems.max": "1"}) == 1
    assert "num_problems 2, not 1" in capsys.readouterr().err
    assert call(evaluate, flags | {"--problems.max": "1"}, "--evaluate.overwrite") == 0
    assert json.loads((folder / "summary.json").read_text())["n"] == 1


def test_evaluate_continues_an_unfinished_evaluation(flags, tmp_path):
    folder = tmp_path / "evaluation"
    flags = flags | {"--evaluate.output_dir": str(folder), "--evaluate.batch_size": "1"}
    flags |= {"--evaluate.max_new_tokens": "32"}
    assert call(evaluate, flags) == 0
    whole = (folder / "results.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    (folder / "results.jsonl").write_bytes(whole[: len(whole) // 2 + 20])
    assert call(evaluate, flags) == 0
    assert (folder / "results.jsonl").read_bytes() == whole


@pytest.mark.parametrize("template, words", [("nowhere.jinja", "no such file"), ("{{ x }}", "does not write")])
def test_a_chat_template_that_cannot_be_used(sample_flags, template, words, capsys):
    chat = ["--data.apply_chat_template", "--data.tokenizer_chat_template", template]
    assert call(sample, sample_flags, *chat) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --data.tokenizer_chat_template {template}: ") and words in error
    assert "\n" not in error


@pytest.mark.parametrize("by_file", [False, True])
def test_chat_template_gives_the_prompt_that_training_uses(flags, model_folder, tmp_path, by_file):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
    template += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    if by_file:
        (tmp_path / "template.jinja").write_text(template)
        template = str(tmp_path / "template.jinja")
    chat = ["--data.apply_chat_template", "--data.tokenizer_chat_template", template]
    output = {"--sample.output": str(tmp_path / "out.jsonl"), "--sample.max_new_tokens": "8"}
    assert call(sample, flags | output, *chat) == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    args = parse("train_pipa", chat)
    tokenizer = load_tokenizer(model_folder)
    (first, *_) = load_samples(args, tokenizer, dataset=output["--sample.output"]).samples
    assert (
        tokenizer.decode(first.input_ids[: first.prompt_len]) == settings["first_prompt"] == "<user>right?<assistant>"
    )


def test_evaluate_several_answers_by_level(flags, tmp_path, capsys):
    """Temperature near 0 on a model that knows one answer: all its answers to a problem are the same."""
    problems = [RIGHT | {"level": "Level 1"}, WRONG | {"level": "Level 2"}]
    (tmp_path / "levels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    folder = tmp_path / "evaluation"
    flags = flags | {"--problems.file": str(tmp_path / "levels.jsonl"), "--evaluate.output_dir": str(folder)}
    flags |= {"--evaluate.max_new_tokens": "32", "--evaluate.decode": "sample", "--evaluate.num_answers": "3"}
    flags |= {"--evaluate.temperature": "0.001", "--evaluate.batch_size": "3"}
    assert call(evaluate, flags) == 0
    printed = capsys.readouterr().out
    assert "accuracy 50.0% (3 of 6 answers to 2 problems), 95 % interval 0.0% to 100.0%" in printed
    assert printed.count("math-verify 0.9.0") == 2  # under the table, and in the line
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["grader"].startswith("math-verify 0.9.0")
    scores = {(one["score"], one.get("level")): one["value"] for one in summary["scores"]}
    assert scores["maj@3", None] == scores["pass@2", None] == 0.5
    assert scores["maj@3", "Level 1"] == 1 and scores["pass@3", "Level 2"] == 0

    whole = (folder / "results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:-5])
    assert call(evaluate, flags) == 0
    assert (folder / "results.jsonl").read_bytes() == whole
    assert call(evaluate, flags | {"--evaluate.decode": "greedy"}) == 1
    assert "num_samples 3, not 1" in capsys.readouterr().err


def test_evaluate_with_worked_examples(flags, tmp_path):
    """The prompt is what the settings say, and the model of one answer still gives it."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"question": "one?", "answer": "1 = 1\n#### 1"}) + "\n")
    folder = tmp_path / "evaluation"
    more = {"--prompt.few_shot": str(examples), "--evaluate.output_dir": str(folder), "--evaluate.max_new_tokens": "4"}
    assert call(evaluate, flags | more | {"--data.input_template": "Q: {}\n"}) == 0
    settings = json.loads((folder / "results.jsonl.settings.json").read_text())
    assert settings["first_prompt"] == "Q: one?\n1 = 1\n#### 1\n\nQ: right?\n"
    assert settings["stop"] == "\nQ:"
