"""scripts/stage.sh: a stage is run once, and its marker is written only where it succeeded."""

import subprocess
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
    assert done.stderr == ("error: one failed: the cause\n" if shown else "")
    assert done.stdout == "== one\n" and log.read_text() == "much\nthe cause\n"
    assert not list((tmp_path / "done").iterdir())
