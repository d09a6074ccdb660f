"""The command that shows data."""

import pytest

from pipa_openrlhf.cli.inspect_data import cli, paint
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import tokenise


def sample(tokenizer):
    step = "b<output>3</output>"
    record = Record("Q\n", ["a", step], [1, 0], 0, "p", "x", masked_spans=((1, 1, len(step)),))
    return tokenise([record], tokenizer, max_len=100, annotation="step")[0][0]


@pytest.mark.parametrize("name", ["characters", "bytes"])
def test_marks_without_colour(tokenizers, name):
    text = paint(sample(tokenizers[name]), tokenizers[name], coloured=False)
    assert text == "[prompt]Q\n[step 1: 1]a\n[step 2: 0]b[step 2: masked]<output>3</output>[step 2: 0]<eos>"


def test_colours(tokenizers):
    text = paint(sample(tokenizers["bytes"]), tokenizers["bytes"], coloured=True)
    dim, green, red, grey, end = "\033[2m", "\033[32m", "\033[31m", "\033[90m", "\033[0m"
    expected = [dim, "Q\n", end, green, "a\n", end, red, "b", end, grey, "<output>3</output>", end, red, "<eos>", end]
    assert text == "".join(expected)


def test_control_characters_of_the_data_do_not_reach_the_terminal(tokenizers):
    record = Record("Q", ["\033[2J"], None, 1, "p", "x")
    (one,), _ = tokenise([record], tokenizers["bytes"], max_len=100)
    assert "\033" not in paint(one, tokenizers["bytes"], coloured=False)


def test_the_whole_command(tokenizers, write_rows, tmp_path, capsys):
    tokenizers["bytes"].save_pretrained(tmp_path / "tokenizer")
    path = write_rows(
        [
            {"prompt": "the\n", "completions": ["cat", "sat"], "labels": [1, 1]},
            {"prompt": "the\n", "completions": ["cat", "mat"], "labels": [1, 0]},
            {"prompt": "the\n", "completions": ["cat " * 100], "labels": [0]},
        ]
    )
    flags = ["--data.dataset", path, "--model.model_name_or_path", str(tmp_path / "tokenizer")]
    assert cli([*flags, "--data.annotation", "step", "--data.max_len", "40"]) == 0
    out = capsys.readouterr().out
    assert "answers   3 read, 2 used, of 1 problems" in out
    assert "1 right (50.0 %), 1 wrong" in out
    assert "dropped   1 longer than --data.max_len" in out
    assert "[prompt]the\n[step 1: 1]cat\n[step 2: 0]mat<eos>" in out
    assert "\033" not in out


@pytest.mark.parametrize(
    "flags, problem",
    [
        ([], "--data.dataset is missing"),
        (["--data.dataset", "x.jsonl"], "--model.model_name_or_path is not given"),
        (["--data.dataset", "x.jsonl", "--wrong", "1"], "unrecognized arguments: --wrong"),
        (["--data.dataset", "x.jsonl", "--model.model_name_or_path", "TOKENIZER"], "x.jsonl: No such file"),
    ],
)
def test_mistakes_end_in_one_line(tokenizers, tmp_path, capsys, flags, problem):
    tokenizers["bytes"].save_pretrained(tmp_path / "tokenizer")
    assert cli([str(tmp_path / "tokenizer") if flag == "TOKENIZER" else flag for flag in flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert problem in error


def test_skipped_rows_are_counted(tokenizers, write_rows, tmp_path, capsys):
    tokenizers["bytes"].save_pretrained(tmp_path / "tokenizer")
    good = {"prompt": "the\n", "completion": "cat", "label": 1}
    path = write_rows([good, {**good, "label": 7}, good, {**good, "label": 8}])
    words = ["--data.dataset", path, "--model.model_name_or_path", str(tmp_path / "tokenizer")]
    before = sorted(tmp_path.iterdir())
    assert cli([*words, "--data.on_error", "skip", "--data.max_error_share", "0.5"]) == 0
    output = capsys.readouterr().out
    assert f"{path}: skipped 2 of 4 rows: 'label' is ...; " in output and "skipped   2 rows that" in output
    assert sorted(tmp_path.iterdir()) == before
    assert cli(words) == 1
    assert f"{path} line 2: 'label' is 7" in capsys.readouterr().err
