"""Prepared data: the same whoever prepares them, found again, prepared anew when anything they follow from changes."""

import copy
import json
import pickle
from datetime import datetime

import datasets
import numpy as np
import pytest
from prepared import ROWS, everything, plain, stores

from pipa_openrlhf.data import prepare, sources
from pipa_openrlhf.data.record import kind_of
from pipa_openrlhf.data.render import fix_template_date
from pipa_openrlhf.data.samples import Joined, Sample, as_samples
from pipa_openrlhf.data.training_set import TrainingSet
from pipa_openrlhf.errors import UserError


@pytest.mark.parametrize(
    "workers_are, probs, pairing",
    [
        ("processes", "0.3,0.7", "match"),
        ("threads", "0.3,0.7", "auto"),
        ("threads", None, "match"),
        ("threads", None, "auto"),
    ],
)
def test_samples_do_not_depend_on_who_prepares_them(
    load, write_rows, tmp_path, monkeypatch, request, workers_are, probs, pairing
):
    if workers_are == "threads":
        request.getfixturevalue("worker_threads")
    path = ",".join([write_rows(ROWS, "a.jsonl"), write_rows(ROWS[::-1][:25], "b.jsonl")])
    options = {"probs": probs, "pairing": pairing}
    found = {name: load(path, cache=name, num_proc=number, **options) for name, number in (("one", 1), ("two", 2))}
    found["again"] = load(path, cache="two", num_proc=2, **options)
    monkeypatch.setattr(prepare, "_CHUNK", 1000)
    monkeypatch.setattr(prepare, "FEW_ROWS", 1000)
    found["in memory"] = load(path, cache="none", **options)
    assert not (tmp_path / "none").exists()
    assert len(found["one"].samples) > 20 and found["one"].dropped
    assert len({str(everything(loaded)) for loaded in found.values()}) == 1
    assert len({TrainingSet(loaded.samples).fingerprint() for loaded in found.values()}) == 1


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.usefixtures("worker_threads")
def test_pairs_are_told_apart_across_chunks(load, write_rows, number):
    rows = [{"prompt": f"{n}?", "chosen": "the cat", "rejected": "the"} for n in range(40)]
    pair_ids = load(write_rows(rows), annotation="answer", pairing="given", num_proc=number).samples.column("pair_id")
    assert pair_ids.tolist() == [n // 2 for n in range(80)]


def test_a_second_start_reads_nothing_again(load, write_rows, tmp_path, monkeypatch):
    path = write_rows(ROWS)
    first = load(path)
    (store,) = stores(tmp_path)
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in store.iterdir()}
    read = counted_lines(monkeypatch)
    monkeypatch.setattr(prepare, "SAMPLE_SIZE", 4)
    monkeypatch.setattr(prepare, "_read", lambda *_: pytest.fail("prepared again"))
    assert everything(load(path)) == everything(first)
    assert max(read) == 6  # whether there are more than a few, and how they are laid out
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in store.iterdir()} == before


def test_a_stream_is_prepared_as_a_table_is(load, tmp_path):
    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert everything(load(path, streaming=True, cache="stream")) == everything(load(path))
    assert len(stores(tmp_path, "stream")) == 1


def counted_lines(monkeypatch) -> list[int]:
    """Numbers of the lines that are read from now on."""
    read: list[int] = []
    real = sources.read_json_texts

    def reading(*file):
        for line, text in real(*file):
            read.append(line)
            yield line, text

    monkeypatch.setattr(sources, "read_json_texts", reading)
    return read


def other_vocabulary(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["cat"])
    return other


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT = {"apply_chat_template": True, "tokenizer_chat_template": TEMPLATE}
# What is prepared anew: flags of the first start, and of the second.
CHANGES = {
    "max_len": ({}, {"max_len": 25}),
    "annotation": ({}, {"annotation": "answer"}),
    "separator": ({}, {"step_separator": " "}),
    "input template": ({}, {"input_template": "Q: {}"}),
    "chat template": (CHAT, {**CHAT, "tokenizer_chat_template": TEMPLATE.replace("<", "[")}),
    "number of rows": ({}, {"max_samples": 30}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_flag_is_prepared_anew(load, write_rows, chat, tmp_path, what):
    path = write_rows(ROWS)
    before, after = CHANGES[what]
    first = load(path, chat, max_len=before.pop("max_len", 60), **before)
    second = load(path, chat, **{"max_len": 60, **after})
    assert len(stores(tmp_path)) == 2
    assert everything(first) != everything(second)


def test_other_content_code_or_tokenizer_is_prepared_anew(load, write_rows, tokenizers, tmp_path, monkeypatch):
    path = write_rows(ROWS)
    load(path)
    write_rows([{**ROWS[0], "prompt": "two"}, *ROWS[1:]])
    assert load(path).samples[0].problem_id == "two"
    assert len(stores(tmp_path)) == 2
    load(path, other_vocabulary(tokenizers["bytes"]))
    assert len(stores(tmp_path)) == 3
    monkeypatch.setattr(prepare, "_code_id", lambda: "other")
    load(path)
    assert len(stores(tmp_path)) == 4


def test_what_changes_nothing_is_found_again(load, write_rows, tmp_path):
    path = write_rows(ROWS)
    for flags in ({}, {"on_error": "skip"}, {"num_proc": 2}, {"pairing": "match"}, {"dataloader_num_workers": 1}):
        load(path, seed=len(flags), **flags)
    assert len(stores(tmp_path)) == 1


def test_another_order_is_prepared_anew(load, write_rows, tmp_path):
    path = ",".join([write_rows(ROWS, "a.jsonl"), write_rows(ROWS[::-1], "b.jsonl")])
    options = [{"probs": "0.5,0.5", "seed": 1}, {"probs": "0.5,0.5", "seed": 2}, {"probs": "0.9,0.1", "seed": 2}, {}]
    orders = [tuple(one.where for one in load(path, **given).samples) for given in options]
    assert len(set(orders)) == len(stores(tmp_path)) == 4


LAYOUT = """
from pipa_openrlhf.data.record import Record

def fits(row, flags):
    return "completions" in row

def read(row, where, index, flags):
    return [Record(row["prompt"], row["completions"], None, {label}, str(index), where)]
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_layout_of_ones_own_counts_by_its_code(load, write_rows, tmp_path, number):
    path = write_rows(ROWS)
    right = []
    for name, label in (("a", 1), ("b", 1), ("c", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(LAYOUT.format(label=label))
        processes = number if name == "a" else 1
        flags = {"layout_module": str(tmp_path / name / "mine.py"), "annotation": "answer", "num_proc": processes}
        right.append(int(load(path, **flags).samples.column("answer_label").sum()))
    assert right == [36, 36, 0] and len(stores(tmp_path)) == 2


def test_the_day_a_template_writes_counts_and_its_minute_does_not(chat):
    ids = []
    for time_of_run in ("2026-01-02T03:04:05", "2026-01-02T13:14:15", "2026-01-03T03:04:05"):
        tokenizer = copy.deepcopy(chat)
        tokenizer.chat_template = (
            TEMPLATE + "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
        )
        fix_template_date(tokenizer, time_of_run)
        ids.append(prepare.tokenizer_id(tokenizer, uses_template=True))
    assert ids[0] == ids[1] != ids[2]
    tokenizer.chat_template = TEMPLATE + "{% set now = strftime_now %}{{ now('%d') }}"
    fix_template_date(tokenizer, datetime.now().isoformat())
    assert prepare.tokenizer_id(tokenizer, True) != prepare.tokenizer_id(chat, True)


BAD = [
    {**ROWS[1], "labels": [1]},
    {**ROWS[1], "labels": ["odd", 1, 1]},
    {**ROWS[1], "prompt": None},
    {"completions": ["a"]},
]


def with_bad_rows(write_rows) -> str:
    path = write_rows([*ROWS[:30], *BAD, *ROWS[30:]])
    with open(path, "ab") as file:
        file.write(b'{"prompt": \n{"prompt": "\xff"}\n[1]\n')
    return path


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.usefixtures("worker_threads")
def test_bad_rows_end_the_run_or_are_skipped(load, write_rows, tmp_path, monkeypatch, number, kept):
    if not kept:
        monkeypatch.setattr(prepare, "FEW_ROWS", 1000)
    path = with_bad_rows(write_rows)
    with pytest.raises(UserError, match=f"{path} line 31: 1 'labels' for 3 steps; give one label a step"):
        load(path, num_proc=number)
    assert stores(tmp_path) == []
    skip = {"on_error": "skip", "max_error_share": 0.2, "num_proc": number}
    for _ in range(2):  # the second finds what the first prepared
        loaded = load(path, **skip)
        places = [f"{path} line {n}" for n in (31, 32, 33, 34, 45, 46, 47)]
        assert [where for where, _ in loaded.bad_rows] == places
        assert f"{path}: skipped 1 of 47 rows: N 'labels' for N steps; give one label a step" in load.lines
    good = load(write_rows(ROWS, "good.jsonl"), cache="other")
    assert [one.input_ids.tolist() for one in loaded.samples] == [one.input_ids.tolist() for one in good.samples]
    with pytest.raises(UserError, match="line 31: 1 'labels' for 3 steps"):
        load(path)  # what was prepared with skip does not hide it
    with pytest.raises(UserError) as error:
        load(path, **{**skip, "max_error_share": 0.1})
    assert "\n" not in str(error.value) and "bad, more than --data.max_error_share 0.1" in str(error.value)


KINDS = {
    "'labels[3]' is 'x3'; a label is true/false or 1/0": "'labels[N]' is ...; a label is true/false or 1/0",
    "not valid JSON (Expecting value, column 7); write one": "not valid JSON; write one",
    "'prompt' is null; give it a value": "'prompt' is null; give it a value",
    "2 'labels' for 14 steps; give one": "N 'labels' for N steps; give one",
}


def test_kinds_of_bad_rows_leave_out_what_is_of_one_row():
    assert {kind_of("a line 1", f"a line 1: {problem}") for problem in KINDS} == set(KINDS.values())


def test_only_the_wanted_rows_are_read(load, write_rows, monkeypatch):
    path = write_rows(ROWS * 50)
    read = counted_lines(monkeypatch)
    for wanted in (3, 10):
        read.clear()
        assert load(path, max_samples=wanted).num_records == wanted
        assert max(read) == wanted


def test_columns_are_mapped_and_handed_over_by_name(load, write_rows):
    samples = load(write_rows(ROWS)).samples
    for name in ("input_ids", "length", "where"):
        array = samples.column(name)
        while array.base is not None and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap)
    assert not samples[0].input_ids.flags.writeable
    copied = pickle.dumps(samples[np.arange(3)])
    assert len(copied) < 2000
    assert [plain(one) for one in pickle.loads(copied)] == [plain(one) for one in samples[:3]]


def test_a_tokenizer_that_cannot_be_pickled_is_used_here(load, write_rows, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bytes"])
    path = write_rows(ROWS)
    expected = everything(load(path, cache="other"))
    tokenizer.note = lambda: None
    assert everything(load(path, tokenizer, num_proc=2)) == expected
    assert any(line.startswith("--data.num_proc: one process prepares the data") for line in load.lines)


@pytest.mark.usefixtures("worker_threads")
def test_a_table_is_kept_too(load, tmp_path):
    import datasets

    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list([{**row, "extra": None} for row in ROWS]).to_parquet(path)
    first = load(path, num_proc=2)
    assert first.samples[0].where == f"{path} row 1" and len(stores(tmp_path)) == 1
    assert everything(load(path)) == everything(first) and len(stores(tmp_path)) == 1


def test_columns_give_samples_back():
    one = np.ones(2, dtype=np.int8)
    samples = [
        Sample(np.arange(4, dtype=np.int32), 2, one, one, one.astype(np.int32), 1, "é\n", 3, "wo: ü line 1"),
        Sample(np.arange(2, dtype=np.int32), 0, 0 * one, one, one.astype(np.int32), 0, "", None, ""),
    ]
    columns = as_samples(samples)
    expected = [plain(sample) for sample in samples]
    assert [plain(sample) for sample in columns] == expected
    assert plain(columns[-1]) == expected[1]
    assert [plain(sample) for sample in Joined([columns, columns[1:]])] == [*expected, expected[1]]
    assert [plain(sample) for sample in columns[np.array([1, 0])][1:]] == expected[:1]
    with pytest.raises(IndexError):
        columns[2]
    assert list(as_samples([])) == []
    assert columns.column("right_tokens").tolist() == [2, 0] and columns.token_ids().tolist() == [0, 1, 2, 3]
    json.dumps(columns[0].answer_label)  # plain numbers
