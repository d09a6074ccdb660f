"""Sampling and evaluation by several ranks: the file is the one that a single process would write."""

import json

import pytest
from test_sampling import make_model, make_tokenizer
from tiny import flags, run_in_process, run_module

LETTERS = "abcdefg"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(output)``: flags of sampling two answers to seven problems, two problems a batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    # Of different lengths: the longest prompts are answered first, so the file has another order than the problems.
    problems = [
        {"problem_id": letter, "question": letter * (n + 1), "answer": "4"} for n, letter in enumerate(LETTERS)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))

    def make(output: str) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tmp_path / "model",
                "problems.file": tmp_path / "problems.jsonl",
                "ds.param_dtype": "fp32",
                "sample.output": tmp_path / output,
                "sample.num_answers": 2,
                "sample.batch_size": 4,
                "sample.max_new_tokens": 4,
                "sample.temperature": 1,
            }
        )

    return make


def test_two_ranks_write_what_one_process_writes_and_take_over_what_others_left(command, tmp_path):
    """They find what one process began, and what a third rank of an earlier start had finished."""
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    lines = (tmp_path / "alone.jsonl").read_text().splitlines(keepends=True)
    settings = (tmp_path / "alone.jsonl.settings.json").read_text()
    for name, rows in (("shared.jsonl", lines[:4]), ("shared.jsonl.rank2", lines[8:12] + [lines[13][:20]])):
        (tmp_path / name).write_text("".join(rows))
        (tmp_path / f"{name}.settings.json").write_text(settings)
    done = run_module("sample", *command("shared.jsonl"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "shared.jsonl").read_text() == "".join(lines)
    assert len(lines) == 14 and done.stdout.count("14 answers to 7 problems") == 1
    assert sorted(path.name for path in tmp_path.glob("shared*")) == ["shared.jsonl", "shared.jsonl.settings.json"]


def test_one_process_takes_over_what_ranks_left(command, tmp_path, capsys):
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    whole = tmp_path / "alone.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    (tmp_path / "alone.jsonl.rank0").write_text("".join(lines[4:8]))
    (tmp_path / "alone.jsonl.rank1").write_text("".join([*lines[8:], lines[4].replace('"sample": 0', '"sample": 1')]))
    whole.write_text("".join(lines[:4]))
    for rank in range(2):
        (tmp_path / f"alone.jsonl.rank{rank}.settings.json").write_text(
            (tmp_path / "alone.jsonl.settings.json").read_text()
        )
    capsys.readouterr()
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    assert whole.read_text() == "".join(lines), "the first of two rows of one answer stays"
    assert "sampling" not in capsys.readouterr().err, "nothing was left to sample"
    assert not list(tmp_path.glob("*.rank*"))


def test_what_ranks_left_under_other_settings_is_not_taken_over(command, tmp_path):
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    whole = tmp_path / "alone.jsonl"
    rows = whole.read_text()
    settings = json.loads((tmp_path / "alone.jsonl.settings.json").read_text())
    for name in ("alone.jsonl", "alone.jsonl.settings.json"):
        (tmp_path / name).unlink()
    (tmp_path / "alone.jsonl.rank0").write_text(rows.replace('"completion": "', '"completion": "another model'))
    (tmp_path / "alone.jsonl.rank0.settings.json").write_text(json.dumps({**settings, "model": "another"}))
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    assert whole.read_text() == rows
    assert not list(tmp_path.glob("*.rank*"))


def test_rows_that_ranks_left_stand_where_one_process_writes_them(command, tmp_path):
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    whole = tmp_path / "alone.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    (tmp_path / "alone.jsonl.rank1").write_text("".join(lines[8:12]))
    (tmp_path / "alone.jsonl.rank1.settings.json").write_text((tmp_path / "alone.jsonl.settings.json").read_text())
    whole.write_text("".join(lines[:4]))
    assert run_in_process("sample", *command("alone.jsonl")) == 0
    assert whole.read_text() == "".join(lines)
