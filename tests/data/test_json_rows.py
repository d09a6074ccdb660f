"""JSON files: rows know their line, and every defect is reported at its own."""

import json
import os

import pytest

from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError


def write(tmp_path, content: str | bytes, name="data.json") -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("data.jsonl", '{"a": 0}\n{"a": 1}\n', [1, 2]),
        ("data.jsonl", '{"a": 0}\r\n\r\n  \n{"a": 1}', [1, 4]),
        ("data.json", '{"a": 0}\n\n{"a": 1}\n', [1, 3]),
        ("data.json", '[{"a": 0}, {"a": 1}]', [1, 1]),
        ("data.json", '[\n  {\n    "a": 0\n  },\n\n  {"a": 1}\n]\n', [2, 6]),
        ("data.json", '\ufeff[{"a": 0},\n{"a": 1}]', [1, 2]),
        ("data.jsonl", '\ufeff{"a": 0}\n{"a": 1}', [1, 2]),
    ],
)
def test_rows_and_their_lines(tmp_path, name, content, lines):
    path = write(tmp_path, content, name)
    assert list(read_json_rows(path)) == [(f"{path} line {line}", {"a": i}) for i, line in enumerate(lines)]


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    row = {"a": "one\u2028two\x85three"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False) + "\n", "data.jsonl")
    assert [found for _, found in read_json_rows(path)] == [row]


@pytest.mark.parametrize(
    "name, content, line, problem",
    [
        ("data.jsonl", '{"a": 1}\n{"a": \n', 2, "not valid JSON"),
        ("data.jsonl", '{"a": 1}\n\n{"a": 1} {"a": 2}\n', 3, "not valid JSON"),
        ("data.jsonl", '{"a": 1}\n[1, 2]\n', 2, "a row must be a JSON object, this is a list"),
        ("data.jsonl", '"text"\n', 1, "a row must be a JSON object, this is a string"),
        ("data.jsonl", "null\n", 1, "a row must be a JSON object, this is null"),
        ("data.json", '[\n{"a": 1},\n3\n]', 3, "a row must be a JSON object, this is a number"),
        ("data.json", '[\n{"a": 1},\n{"a": oops}\n]', 3, "not valid JSON"),
        ("data.json", '[\n{"a": 1}\n{"a": 2}\n]', 3, "expected ',' or ']'"),
        ("data.json", '[\n{"a": 1},\n', 3, "not valid JSON"),
        ("data.json", '[{"a": 1}]\n{"a": 2}', 2, "text after the end of the list"),
        ("data.jsonl", '{"a": ' + "[" * 100_000, 1, "not valid JSON"),
        ("data.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', 2, "not UTF-8"),
    ],
)
def test_defects_name_file_and_line(tmp_path, name, content, line, problem):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError) as error:
        list(read_json_rows(path))
    message = str(error.value)
    assert message.startswith(f"{path} line {line}: ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[ ]\n"])
def test_no_rows_is_an_error(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match="empty|no rows"):
        list(read_json_rows(path))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        list(read_json_rows(str(tmp_path / "nowhere.jsonl")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path, "{}")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="Permission denied"):
        list(read_json_rows(path))
