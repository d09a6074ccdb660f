"""The quickstart script: refuses what it does not know, and in its short form runs every stage and then none."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.sh"


def call(*flags, timeout=900):
    return subprocess.run(["bash", str(SCRIPT), *flags], capture_output=True, text=True, timeout=timeout)


def test_unknown_argument():
    done = call("--slow", timeout=20)
    assert done.returncode == 1 and done.stderr == "error: unknown argument --slow (use --fast or --work FOLDER)\n"


@pytest.mark.slow
def test_fast_form_ends_in_a_report_and_is_not_run_twice(tmp_path):
    work = tmp_path / "work"
    first = call("--fast", "--work", str(work))
    assert first.returncode == 0, first.stderr[-2000:]
    page = (work / "report.html").read_text()
    for text in ("SFT", "PIPA-M (step)", "PIPA-N (answer)", "pipa_openrlhf.cli.train_pipa"):
        assert text in page
    again = call("--fast", "--work", str(work), timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == len(list((work / "done").iterdir()))
    table = first.stdout[first.stdout.index("== report") :]
    assert again.stdout.endswith(table)
