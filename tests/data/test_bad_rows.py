"""--data.on_error skip: bad rows are counted, written down, and never too many."""

import json

import pytest
from tiny import read_jsonl, run_in_process, train

from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.errors import UserError

GOOD = {"prompt": "the", "completion": "cat", "label": 1}
BAD = [{**GOOD, "label": "maybe"}, {**GOOD, "completion": ""}]


@pytest.fixture
def write(tmp_path):
    """A file of good rows with bad ones at lines 3 and 5 and a line that is no JSON at 7."""

    def write(good: int) -> str:
        lines = [json.dumps(GOOD)] * good
        lines[2:2], lines[4:4], lines[6:6] = [json.dumps(BAD[0])], [json.dumps(BAD[1])], ['{"prompt": ']
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "data.jsonl")

    return write


def test_bad_rows_end_the_reading(make_args, tokenizers, write):
    with pytest.raises(UserError, match="line 3: 'label' is 'maybe'"):
        load_samples(make_args(), tokenizers["bytes"], dataset=write(20))


def test_skipped_rows_are_listed_with_place_and_reason(make_args, tokenizers, write):
    path = write(20)
    loaded = load_samples(make_args(on_error="skip", max_error_share=0.2), tokenizers["bytes"], dataset=path)
    assert len(loaded.samples) == loaded.num_records == 20
    places = dict(loaded.bad_rows)
    assert list(places) == [f"{path} line {number}" for number in (3, 5, 7)]
    assert places[f"{path} line 3"].startswith(f"{path} line 3: 'label' is 'maybe'; ")
    assert places[f"{path} line 5"].startswith(f"{path} line 5: 'completion' is empty; ")
    assert places[f"{path} line 7"].startswith(f"{path} line 7: not valid JSON")


def test_too_many_bad_rows_end_the_reading_all_the_same(make_args, tokenizers, write):
    path = write(20)
    with pytest.raises(UserError, match="3 of 23 rows are bad, more than --data.max_error_share 0.1$"):
        load_samples(make_args(on_error="skip", max_error_share=0.1), tokenizers["bytes"], dataset=path)


def test_a_run_writes_them_beside_its_results(small_run, tmp_path, write, capsys):
    changes = {
        "data.dataset": write(20),
        "data.annotation": "answer",
        "data.on_error": "skip",
        "data.max_error_share": 0.2,
        "train.batch_size": 20,
        "train.max_epochs": 1,
        "ckpt.save_steps": None,
    }
    train("train_pipa", *small_run("out", **changes))
    rows = read_jsonl(tmp_path / "out" / "skipped_rows.jsonl")
    assert [row["where"].split()[-1] for row in rows] == ["3", "5", "7"]
    assert rows[0]["reason"].startswith("'label' is 'maybe'; ")
    assert "3 rows were skipped: see " in capsys.readouterr().out

    assert run_in_process("train_pipa", *small_run("out2", **changes | {"data.max_error_share": 0.01})) == 1
    assert "more than --data.max_error_share" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()

    (tmp_path / "data.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 20)
    with_skipped = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    train("train_pipa", *small_run("out", **changes), "--ckpt.overwrite")
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == with_skipped[0]["loss"]
