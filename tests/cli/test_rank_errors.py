"""Errors of several ranks: each one is shown, the same one once."""

import os
import socket
import subprocess
import sys
from functools import partial

import pytest

from pipa_openrlhf.cli import entry
from pipa_openrlhf.cli import entry as rank_errors
from pipa_openrlhf.errors import UserError

RANK = """
import sys
from pipa_openrlhf.cli import entry
from pipa_openrlhf.errors import UserError

def main(args):
    raise UserError(sys.argv[1])

entry.run(main, "objectives", [])
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(rank_errors.tempfile, "tempdir", None)


def environment_of(rank: int, ranks: int, port: str = "29500") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}


def test_the_same_mistake_of_several_processes_is_shown_once_with_its_host():
    lines = []
    for rank in range(2):
        environment = {**os.environ, **environment_of(rank, 2)}
        command = [sys.executable, "-c", RANK, "no such file"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines += filter(None, done.stderr.splitlines())
    assert lines == [f"error: no such file (rank 0 on {socket.gethostname()})"]


@pytest.fixture
def run_ranks(monkeypatch, capsys):
    """``run_ranks(messages)`` -> lines that ranks with these messages print, one after the other in this process."""

    def fail(error: Exception, _config) -> None:
        raise error

    def run(messages: list[str], error: type = UserError, port: str = "29500") -> list[str]:
        for rank, message in enumerate(messages):
            for name, value in environment_of(rank, len(messages), port).items():
                monkeypatch.setenv(name, value)
            assert entry.run(partial(fail, error(message)), "objectives", []) == 1
        return [line for line in capsys.readouterr().err.splitlines() if line]

    return run


def test_a_mistake_of_one_rank_is_shown(run_ranks):
    lines = run_ranks(["model: no such folder", "data: no such file", "model: no such folder"])
    assert [line.split(" (")[0] for line in lines] == ["error: model: no such folder", "error: data: no such file"]
    assert "(rank 1 on" in lines[1]


def test_errors_of_the_system_are_shown_once_too(run_ranks):
    assert len(run_ranks(["disk"] * 2, error=OSError)) == 1


def test_the_next_run_shows_the_same_mistake_again(run_ranks):
    assert len(run_ranks(["no such file"] * 2) + run_ranks(["no such file"] * 2, port="29501")) == 2


def test_marks_of_earlier_runs_are_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_errors.tempfile, "gettempdir", lambda: str(tmp_path))
    rank_errors.show_error("error: once")
    (mark,) = tmp_path.iterdir()
    os.utime(mark, (0, 0))
    rank_errors.show_error("error: once")
    assert capsys.readouterr().err.count("error: once") == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_line_that_the_first_rank_was_killed_over_is_shown_by_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_errors.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(rank_errors, "_PATIENCE", 0.2)
    assert rank_errors._is_first(rank_errors._mark_of("error: late"))  # and no more of that rank
    for _ in range(2):
        rank_errors.show_error("error: late")
    assert capsys.readouterr().err.count("error: late") == 1


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_errors.tempfile, "gettempdir", lambda: str(tmp_path / "absent"))
    for _ in range(2):
        rank_errors.show_error("error: seen")
    assert capsys.readouterr().err.count("error: seen") == 2


def test_the_line_does_not_end_the_progress_bar_of_another_rank(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    print("\rTrain step:   0%|", end="", file=sys.stderr)
    rank_errors.show_error("error: disk")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: disk")]


def test_one_process_shows_the_bare_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")

    def main(args):
        raise UserError("wrong flag")

    assert entry.run(main, "objectives", []) == 1
    assert capsys.readouterr().err == "error: wrong flag\n"
