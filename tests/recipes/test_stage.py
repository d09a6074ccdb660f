"""scripts/stage.sh: a stage is run once, and its marker is written only where it succeeded."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGE = Path(__file__).resolve().parents[2] / "scripts" / "stage.sh"


def stage(tmp_path, command, log=""):
    script = f'set -euo pipefail; source "{STAGE}"; stage_log={log}; stage "{tmp_path}" one bash -c "$1"; echo after'
    return subprocess.run(["bash", "-c", script, "bash", command], capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("in_log", [True, False])
def test_a_stage_is_run_once(tmp_path, in_log):
    log = tmp_path / "one.log" if in_log else ""
    first = stage(tmp_path, "echo said", log)
    assert first.returncode == 0
    assert ("said" in first.stdout) != in_log
    assert first.stdout.startswith("== one\n") and first.stdout.endswith(" s\nafter\n")
    assert not in_log or log.read_text() == "said\n"
    assert (tmp_path / "done" / "one").read_text().endswith("bash -c echo\\ said \n")
    again = stage(tmp_path, "echo said", log)
    assert again.stdout == "== one: done before\nafter\n"


@pytest.mark.parametrize("status, shown", [(3, True), (137, True), (130, False)])
def test_of_a_stage_that_fails_in_a_log_the_last_line_is_shown(tmp_path, status, shown):
    log = tmp_path / "one.log"
    done = stage(tmp_path, f"echo much; echo the cause; exit {status}", log)
    assert done.returncode == status
    assert done.stderr == (f"error: one failed: the cause (see {log})\n" if shown else "")
    assert done.stdout == "== one\n" and log.read_text() == "much\nthe cause\n"
    assert not list((tmp_path / "done").iterdir())


def start_rows(tmp_path, words, command):
    script = f'set -euo pipefail; source "{STAGE}"; side_by_side 2 "{words}" {command} || exit 7; echo after'
    return subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_rows_run_two_at_a_time_and_all_of_them(tmp_path):
    row = tmp_path / "row.sh"
    row.write_text(f'echo began >> "{tmp_path}/log"; sleep 1; echo done >> "{tmp_path}/log"; [ "$1" != b ]')
    process = start_rows(tmp_path, "a b c d", f'bash "{row}"')
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 7
    lines = (tmp_path / "log").read_text().split()
    assert lines.count("done") == 4
    running = [lines[: n + 1].count("began") - lines[: n + 1].count("done") for n in range(len(lines))]
    assert max(running) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_what_runs_and_is_waited_for(tmp_path, number):
    """What runs takes a second to stop, as training does; nothing is started after it."""
    row = tmp_path / "row.py"
    row.write_text(
        "import signal, sys, time\n"
        f"log = open({str(tmp_path / 'log')!r}, 'a')\n"
        "def stop(*_):\n"
        "    time.sleep(1); log.write('stopped\\n'); log.flush(); sys.exit(130)\n"
        f"signal.signal({int(number)}, stop)\n"
        "log.write('began\\n'); log.flush(); time.sleep(60)\n"
    )
    process = start_rows(tmp_path, "a b c d", f'{sys.executable} "{row}"')
    deadline = time.monotonic() + 20
    while (tmp_path / "log").read_text().count("began") < 2 if (tmp_path / "log").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    # Without what it prints, whose end would come only after that of its rows.
    assert process.wait(timeout=20) == 7
    assert sorted((tmp_path / "log").read_text().split()) == ["began"] * 2 + ["stopped"] * 2
