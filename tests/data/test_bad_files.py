"""Bad files, by the hundred and at random: a clear line or a correct parse, never a traceback, never a lost row."""

import json
import math

import pytest
from bad_files import FILES, GOOD, LINE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer, run_in_process, run_module

from pipa_openrlhf.data.dataset import LoadedData, load_samples
from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.data.record import write_bad_rows
from pipa_openrlhf.errors import UserError

# How many rows the files that are read hold; every other one is refused.
ROWS = {
    **dict.fromkeys(("utf8_bom.jsonl", "half_pair_in_a_key.jsonl", "whole_pair.jsonl", "nul_escaped.jsonl"), 2),
    "newline_in_a_key.jsonl": 2,
    **dict.fromkeys(("noncharacter.jsonl", "no_last_newline.jsonl", "crlf.jsonl", "a_list.json"), 2),
    **dict.fromkeys(("deep_beside_good.jsonl", "huge_line.jsonl", "huge_key.jsonl", "many_keys.jsonl"), 2),
    **dict.fromkeys(("special_token.jsonl", "special_token_prompt.jsonl", "only_special_token.jsonl"), 2),
    **dict.fromkeys(("path_as_prompt.jsonl", "traversal_as_id.jsonl", "template_as_text.jsonl"), 2),
    "right_to_left.jsonl": 1,
}
# Of the rows that are read, those that are counted as dropped, and why.
DROPPED = {"noncharacter.jsonl": "no characters", "huge_line.jsonl": "longer than --data.max_len"}


def is_good_then_bad(content: bytes) -> bool:
    """Whether the file's first line is good, and its second the last."""
    return content.startswith(LINE) and content.count(b"\n") == 2


def check_message(message: str, path: str) -> None:
    """One line that names the file, says what to do, and can be printed."""
    message.encode()
    assert message.startswith(path) and len(message) < len(path) + 400
    assert "\n" not in message and "; " in message.removeprefix(path) or "dropped" in message


def check_counts(loaded: LoadedData, rows: int) -> None:
    assert loaded.num_records == rows == len(loaded.samples) + sum(loaded.dropped.values())


def test_there_are_a_hundred():
    assert len(FILES) >= 100 and FILES.keys() >= ROWS.keys() >= DROPPED.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_in_a_line_or_read_whole(name, tmp_path, make_args, tokenizers, log_lines):
    path, content = tmp_path / name, FILES[name]
    path.write_bytes(content)
    if name in ROWS:
        loaded = load_samples(make_args(), tokenizers["bytes"], dataset=str(path))
        check_counts(loaded, ROWS[name])
        assert all(line.encode() and line.isprintable() for line in log_lines)
        assert not loaded.dropped or [DROPPED[name] in reason for reason in loaded.dropped] == [True]
        return
    with pytest.raises(UserError) as error:
        load_samples(make_args(), tokenizers["bytes"], dataset=str(path))
    check_message(str(error.value), str(path))
    if is_good_then_bad(content) and name != "list_without_comma.json":
        assert str(error.value).startswith(f"{path} line 2: ")


@pytest.mark.parametrize("name", [name for name in FILES if is_good_then_bad(FILES[name]) and name not in ROWS])
def test_a_bad_row_is_left_out_and_listed_where_that_is_asked_for(name, tmp_path, make_args, tokenizers):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    loaded = load_samples(make_args(on_error="skip", max_error_share=0.5), tokenizers["bytes"], dataset=str(path))
    check_counts(loaded, 1)
    assert [where for where, _ in loaded.bad_rows] == [f"{path} line 2"]


def check_refusal(status: int, output: str, errors: str, path) -> None:
    assert status == 1 and "Traceback" not in errors + output
    assert [line for line in errors.splitlines() if line.startswith("error: ")][0].startswith(f"error: {path}")


@pytest.mark.parametrize("name", ["deep_list.jsonl", "latin1.jsonl", "ragged.csv"])
def test_a_command_says_it_in_a_line(name, tmp_path, tiny_models, capsys):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    words = ["--data.dataset", path, "--model.model_name_or_path", tiny_models / "policy"]
    status = run_in_process("inspect_data", *words)
    check_refusal(status, *capsys.readouterr(), path)


def test_a_command_can_print_what_no_encoding_has(tmp_path, tiny_models):
    """Real processes, whose output has an encoding."""
    for name in ("half_pair_in_problem_id.jsonl", "half_pair_in_a_key.jsonl"):
        (tmp_path / name).write_bytes(FILES[name])
    model = ["--model.model_name_or_path", tiny_models / "policy"]
    path = tmp_path / "half_pair_in_problem_id.jsonl"
    done = run_module("inspect_data", "--data.dataset", path, *model)
    check_refusal(done.returncode, done.stdout, done.stderr, path)
    done = run_module("inspect_data", "--data.dataset", tmp_path / "half_pair_in_a_key.jsonl", *model)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr[-2000:]
    assert "not read: \\ud800" in done.stdout


def test_what_no_encoding_has_is_listed_among_skipped_rows(tmp_path):
    write_bad_rows(str(tmp_path), [("data.jsonl line 2", "data.jsonl line 2: no column 'label' (columns: \ud800)")])
    assert json.loads((tmp_path / "skipped_rows.jsonl").read_text())["where"] == "data.jsonl line 2"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 1e308]),
    st.text(st.characters(), max_size=4),
    st.sampled_from(["\ud800", "\ufdd0", "<eos>", "<|im_end|>", "../x", "", " ", "nan", "1", "\0"]),
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "\ud800"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": SCALARS}, optional={"tool_calls": st.lists(SCALARS)})
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": SCALARS, "arguments": SCALARS})})
CALLING = st.fixed_dictionaries({"role": ROLES, "content": SCALARS, "tool_calls": st.lists(CALL, max_size=2)})
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(MESSAGE | CALLING, max_size=3),
    st.dictionaries(st.sampled_from(["step", "Q", "text", "rating", "role", "content"]), SCALARS, max_size=3),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2), max_leaves=4),
)
COLUMNS = [
    *("prompt", "completion", "label", "chosen", "rejected", "completions", "labels", "instruction", "output"),
    *("messages", "steps", "answers", "problem_id", "weight", "question", "conversations", "input", "system"),
]
ANY_ROW = st.dictionaries(st.sampled_from(COLUMNS), VALUES, min_size=1, max_size=5)
NEARLY_GOOD = ANY_ROW.map(lambda changes: {**GOOD, **changes})


@given(rows=st.lists(ANY_ROW | NEARLY_GOOD | st.just(GOOD), min_size=1, max_size=4), in_chat=st.booleans())
@settings(max_examples=300)
def test_any_rows_are_refused_in_a_line_or_all_counted(rows, in_chat, tmp_path_factory, make_args):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = make_args(apply_chat_template=in_chat, allow_empty_prompt=True, on_error="skip", max_error_share=1)
    try:
        loaded = load_samples(flags, make_tokenizer(), dataset=str(path))
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    left = sum(count for reason, count in loaded.dropped.items() if not reason.startswith("rows without"))
    assert loaded.num_records == len(loaded.samples) + left
    # A row has an answer, or is one of the rows without, or is bad.
    rows_without = sum(loaded.dropped.values()) - left
    assert loaded.num_records + rows_without + len(loaded.bad_rows) >= len(rows)


TOKENS = st.sampled_from([*(bytes([one]) for one in b'{}[]",:\n1\\\xff'), b'"a"', LINE])


@given(
    content=st.binary(max_size=60) | st.lists(TOKENS).map(b"".join),
    name=st.sampled_from(["data.jsonl", "data.json"]),
)
@settings(max_examples=500)
def test_any_bytes_are_rows_or_refused_in_a_line(content, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    try:
        rows = list(read_json_rows(str(path)))
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert rows and all(isinstance(row, dict) for _, row in rows)
    if name == "data.jsonl":
        assert len(rows) == len([line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()])
