"""The quickstart script: in its short form runs every stage and then none."""

import pytest
from tiny import read_jsonl


def assert_value_model_learned(folder):
    likelihoods = [row["pipa/value_likelihood"] for row in read_jsonl(folder / "metrics.jsonl")]
    last_third = likelihoods[-len(likelihoods) // 3 :]
    assert likelihoods[0] == pytest.approx(0.5) and sum(last_third) / len(last_third) > 0.502


@pytest.mark.slow
def test_fast_form_ends_in_a_report_and_is_not_run_twice(run_script, fast_quickstart):
    """Not measured on an idle machine; the script is stopped after 1800 seconds."""
    work, output = fast_quickstart
    for name in ("report.html", "report_against_more_sft.html"):
        page = (work / name).read_text()
        for text in ("own right answers", "more of that SFT", "DPO", "KTO", "PIPA-M (step)", "PIPA-N (step)"):
            assert text in page
        assert "cli.train_pipa" in page
    assert {path.name for path in (work / "pictures").iterdir()} == {"accuracy.svg", "value_model.svg", "rewards.svg"}
    for variant in "mn":
        assert_value_model_learned(work / f"pipa_{variant}")
    again = run_script("quickstart.sh", "--fast", "--work", work, timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == len(list((work / "done").iterdir()))
    assert again.stdout.endswith(output[output.index("== report") :])
