"""One run at a time writes to a folder."""

import os
import signal
import subprocess
import sys

import pytest
from tiny import run_in_process

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.training import run_lock
from pipa_openrlhf.training.run_lock import LOCK, alone_in

HOLDER = """
import sys, time
from pipa_openrlhf.training.run_lock import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``out``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_is_written_to_is_refused_with_who_does_it(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=f'still going .*"pid": {holder.pid}'), alone_in(str(tmp_path / "out")):
        pass


def test_the_holders_end_is_waited_for_and_no_lock_stays(tmp_path, holder, monkeypatch):
    """As the run that a killed launcher left behind, when it comes to its end."""
    with monkeypatch.context() as patch:
        patch.setattr(run_lock.time, "sleep", lambda seconds: holder.kill())
        with alone_in(str(tmp_path / "out")):
            assert (tmp_path / "out" / LOCK).exists()
    assert holder.wait() == -signal.SIGKILL, "it was waited for"
    assert os.listdir(tmp_path / "out") == []


def test_a_lock_that_was_deleted_by_its_holder_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking, the holder ended and another run made a new one."""
    os.makedirs(tmp_path / "out")
    real, seen = run_lock.fcntl.flock, []

    def flock(descriptor, how):
        real(descriptor, how)
        if not seen:
            os.replace(tmp_path / "new", tmp_path / "out" / LOCK)
        seen.append(descriptor)

    (tmp_path / "new").write_text("")
    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with alone_in(str(tmp_path / "out")):
        assert len(seen) == 2
        assert os.path.samestat(os.stat(tmp_path / "out" / LOCK), os.fstat(seen[1]))


def test_folders_of_a_refused_run_do_not_stay(tmp_path):
    with pytest.raises(UserError), alone_in(str(tmp_path / "a" / "b")):
        assert os.path.isdir(tmp_path / "a" / "b")
        raise UserError
    assert os.listdir(tmp_path) == []


def test_where_files_cannot_be_locked_there_is_none(tmp_path, monkeypatch):
    def refuse(*words):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with alone_in(str(tmp_path / "out")), alone_in(str(tmp_path / "out")):
        pass


def test_checkpoints_that_another_run_writes_to_are_refused_too(small_run, tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    assert run_in_process("train_pipa", *small_run("fresh", **{"ckpt.path": tmp_path / "out"})) == 1
    assert f"{tmp_path / 'out'} is being written to by a run that is still going" in capsys.readouterr().err
    assert not (tmp_path / "fresh").exists()
