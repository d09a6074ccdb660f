"""JSON files: rows know their line, and every defect is reported at its own."""

import gzip
import json
import os
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.data import json_rows
from pipa_openrlhf.data.json_rows import is_json_path, read_json_rows, read_json_texts
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
        ("data.json", b'[\n{"a": 1},\n{"a":\n"caf\xe9"}\n]', 4, "not UTF-8"),
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


ROWS = [{"a": 1, "b": ["x", {"c": "]}"}]}, {"a": '\\"[{'}, {"messages": [{"role": "user"}], "label": True}]
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
FORMS = [
    ("data.jsonl", "\n".join(map(json.dumps, ROWS)), [1, 2, 3]),
    ("data.json", json.dumps(ROWS), [1, 1, 1]),
    ("data.json", json.dumps(ROWS, indent=1), [2, 11, 14]),
    ("data.json", PRETTY, [1, 10, 13]),
    ("data.jsonl", PRETTY, [1, 10, 13]),
    ("data.json", json.dumps({"train": ROWS, "test": [{"no": 1}]}), [1, 1, 1]),
    ("data.json", json.dumps({"test": ROWS}), [1, 1, 1]),
    ("data.json", json.dumps({"data": ROWS}, indent=1), [3, 12, 15]),
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, json_rows._SCANNED])
@pytest.mark.parametrize("name, content, lines", FORMS)
@pytest.mark.parametrize("pack", [None, "gz", "zst"])
def test_forms_of_a_file(tmp_path, monkeypatch, name, content, lines, chunk, pack):
    monkeypatch.setattr(json_rows, "_SCANNED", chunk)
    packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(pack, bytes)(content.encode())
    path = write(tmp_path, packed, f"{name}.{pack}" if pack else name)
    assert is_json_path(path)
    assert list(read_json_rows(path)) == [(f"{path} line {line}", row) for line, row in zip(lines, ROWS, strict=True)]


@pytest.mark.parametrize(
    "row",
    [{"messages": [{"role": "user"}], "label": True}, {"train": [1, 2]}, {"prompt": [{}]}, {"train": [{}], "x": 1}],
)
def test_a_row_with_lists_is_no_set_of_splits(tmp_path, row):
    path = write(tmp_path, json.dumps(row))
    assert [found for _, found in read_json_rows(path)] == [row]


def test_splits_are_chosen_by_name(tmp_path):
    path = write(tmp_path, json.dumps({"train": [{"a": 0}], "test": [{"a": 1}]}))
    assert [row for _, row in read_json_rows(path, "test")] == [{"a": 1}]
    with pytest.raises(UserError, match="no split 'dev', it has train, test; choose one by --data.dataset_split"):
        next(read_json_rows(path, "dev"))


@pytest.mark.parametrize("name, pack", [("data.jsonl.gz", gzip.compress), ("data.jsonl.zst", zstandard.compress)])
def test_damaged_archives(tmp_path, name, pack):
    content = "".join(json.dumps({"a": os.urandom(40).hex()}) + "\n" for _ in range(2000))
    whole = pack(content.encode())
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"no archive"):
        path = write(tmp_path, damaged, name)
        with pytest.raises(UserError, match=f"{name}: the compressed file is damaged or cut off .*; copy it again"):
            list(read_json_rows(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=4), data=st.data())
def test_any_rows_come_out_as_they_went_in(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("any")
    ascii_only, indent, chunk = (
        data.draw(st.booleans()),
        data.draw(st.sampled_from([None, 0, 2])),
        data.draw(st.integers(1, 9)),
    )
    try:
        listed = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_SCANNED", chunk)
        for name, content in (("list.json", listed), ("lines.jsonl", lines)):
            assert [row for _, row in read_json_rows(write(folder, content, name))] == rows


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_large_file_is_never_in_memory(tmp_path, name):
    rows = [{"text": "x" * 1000, "number": number} for number in range(20_000)]
    content = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    path = write(tmp_path, content, name)
    tracemalloc.start()
    count = sum(1 for _ in read_json_texts(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < 8e6
