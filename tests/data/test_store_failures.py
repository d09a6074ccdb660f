"""Prepared data that are damaged, cut off, or wanted by several at once."""

import os
import resource
import threading
import time

import pytest
from prepared import ROWS, everything, stores

from pipa_openrlhf import child_process
from pipa_openrlhf.data import prepare, workers
from pipa_openrlhf.data.samples import Gathered
from pipa_openrlhf.errors import UserError

DAMAGE = {
    "shorter": lambda store: os.truncate(store / "labels", 10),
    "a shorter text": lambda store: os.truncate(store / "where", 10),
    "missing": lambda store: os.remove(store / "mask"),
    "other bytes": lambda store: (store / "input_ids").write_bytes(b"\1" * (store / "input_ids").stat().st_size),
    "half a list": lambda store: (store / "about.json").write_text("{"),
    "no list": lambda store: os.remove(store / "about.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_prepared_again(load, write_rows, tmp_path, what):
    path = write_rows(ROWS)
    expected = everything(load(path))
    (store,) = stores(tmp_path)
    DAMAGE[what](store)
    assert everything(load(path)) == expected
    assert any(f"{store} is damaged (" in line for line in load.lines)
    load(path)
    assert not any(" is damaged (" in line for line in load.lines)


def test_what_was_left_unfinished_goes(load, write_rows, tmp_path):
    path = write_rows(ROWS)
    load(path)
    (store,) = stores(tmp_path)
    left = store.with_name(f"{store.name}.unfinished-1")
    store.rename(left)
    load(path)
    assert stores(tmp_path) == [store]


def test_a_folder_that_cannot_be_written_to(load, write_rows, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"--data\.cache_dir: prepared data cannot be written to .*give another folder"
    ):
        load(write_rows(ROWS))


def test_a_full_disk_leaves_nothing(load, write_rows, tmp_path):
    path = write_rows(ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written to .*File too large.*make room"):
            load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stores(tmp_path) == []
    load(path)
    assert len(stores(tmp_path)) == 1


def test_an_interrupt_ends_workers_and_leaves_nothing(load, write_rows, tmp_path, monkeypatch):
    started = []
    real = child_process.subprocess.Popen

    def start(*words, **options):
        started.append(real(*words, **options))
        return started[-1]

    def interrupted(self, packed):
        raise KeyboardInterrupt

    monkeypatch.setattr(child_process.subprocess, "Popen", start)
    monkeypatch.setattr(Gathered, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(write_rows(ROWS), num_proc=2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert stores(tmp_path) == []


def test_a_worker_that_dies_is_said(load, write_rows, monkeypatch):
    real = workers.Workers.read

    def read(self, chunks):
        self._workers[0].process.kill()
        self._workers[0].process.wait()
        return real(self, chunks)

    monkeypatch.setattr(workers.Workers, "read", read)
    with pytest.raises(RuntimeError, match="a process that prepares data ended"):
        load(write_rows(ROWS), num_proc=2)


def test_of_two_at_once_one_prepares(load, write_rows, monkeypatch):
    path = write_rows(ROWS)
    calls, results = [], []
    real = prepare._read

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(prepare, "_read", slow)
    threads = [threading.Thread(target=lambda: results.append(load(path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({str(everything(one)) for one in results}) == 1 and len(results) == 3


def test_data_that_change_meanwhile_are_refused(load, write_rows, tmp_path, monkeypatch):
    path = write_rows(ROWS)
    real = prepare._read

    def read(*arguments):
        about = real(*arguments)
        write_rows(ROWS[:-1])
        return about

    monkeypatch.setattr(prepare, "_read", read)
    with pytest.raises(UserError, match="the data changed while they were read"):
        load(path)
    assert stores(tmp_path) == []
