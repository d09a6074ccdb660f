"""A results file survives being killed at any byte, and refuses other settings."""

import json

import pytest

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.problems import RowFile

ROWS = [{"problem_id": "é", "sample": 0}, {"problem_id": "b\u2028c", "sample": 1}]


def test_continues_after_every_possible_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(str(path), {"seed": 1}).append(ROWS)
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = RowFile(str(path), {"seed": 1})
        kept = 2 if cut == len(whole) else int(cut >= first_line)
        assert file.rows == ROWS[:kept]
        file.append(ROWS[kept:])
        assert path.read_bytes() == whole


def test_refuses_other_settings_and_says_which(tmp_path):
    path = str(tmp_path / "deep" / "rows.jsonl")
    RowFile(path, {"seed": 1, "model": "m"}).append(ROWS)
    with pytest.raises(UserError, match="seed 1, not 2"):
        RowFile(path, {"seed": 2, "model": "m"})
    with pytest.raises(UserError, match="top_p None, not 0.9"):
        RowFile(path, {"seed": 1, "model": "m", "top_p": 0.9})
    assert RowFile(path, {"model": "m", "seed": 1}).rows == ROWS


def test_refuses_a_file_of_unknown_origin(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match="does not say how it was made"):
        RowFile(str(path), {"seed": 1})


def test_refuses_a_broken_line_in_the_middle(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(str(path), {}).append(ROWS)
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match="line 1: not JSON"):
        RowFile(str(path), {})
