"""The quickstart script: refuses what it does not know, and in its short form runs every stage and then none."""

import pytest


def test_unknown_argument(run_script):
    done = run_script("quickstart.sh", "--slow", timeout=20)
    assert done.returncode == 1 and done.stderr == "error: unknown argument --slow (use --fast or --work FOLDER)\n"


@pytest.mark.slow
def test_fast_form_ends_in_a_report_and_is_not_run_twice(run_script, fast_quickstart):
    work, output = fast_quickstart
    page = (work / "report.html").read_text()
    for text in ("SFT", "PIPA-M (step)", "PIPA-N (answer)", "pipa_openrlhf.cli.train_pipa"):
        assert text in page
    assert {path.name for path in (work / "pictures").iterdir()} == {"accuracy.svg", "value_model.svg", "rewards.svg"}
    again = run_script("quickstart.sh", "--fast", "--work", work, timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == len(list((work / "done").iterdir()))
    assert again.stdout.endswith(output[output.index("== report") :])
