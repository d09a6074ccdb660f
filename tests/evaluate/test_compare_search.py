"""scripts/compare_search.sh: in its short form answers in every way."""

import pytest
from tiny import read_jsonl

ROWS = ("greedy", "maj@8", "SBS (3,2) head", "SBS (3,2) logprob", "SBS (3,2) none")


@pytest.mark.slow
def test_it_answers_in_every_way_and_is_not_run_twice(run_script, finished_quickstart):
    """About 60 seconds, nearly all of it starting seven processes."""
    work = finished_quickstart
    first = run_script("compare_search.sh", "--fast", "--work", work, "--problems", "3")
    assert first.returncode == 0, first.stderr[-2000:]
    out = work / "compare_search_3"
    answers = {path.parent.name: len(read_jsonl(path)) for path in out.glob("*/results.jsonl")}
    assert answers == {"greedy": 3, "maj@8": 24, "SBS__3_2__head": 3, "SBS__3_2__logprob": 3, "SBS__3_2__none": 3}
    table = first.stdout[first.stdout.index("== report") :]
    for name in ROWS:
        assert name in table
    assert table.count(" s\n") == len(ROWS)
    again = run_script("compare_search.sh", "--fast", "--work", work, "--problems", "3", timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == 1 + len(ROWS)
    assert again.stdout.endswith(table)
