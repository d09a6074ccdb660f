"""docs/reliability.md names a test for every promise, and that test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_promise_has_a_test():
    rows = [line.strip("| ").split("|")[-1] for line in PAGE.splitlines() if line.startswith("| ")]
    promises = [cell for cell in rows if cell.strip() != "test"]
    assert len(promises) >= 20
    assert [cell for cell in promises if not re.search(r"`(tests|scripts)/", cell)] == []


def test_what_the_page_names_is_there():
    names = set(re.findall(r"`(?:python )?((?:tests|scripts|benchmarks)/[\w./]+\.(?:py|sh))`", PAGE))
    assert len(names) >= 20 and [name for name in names if not (ROOT / name).is_file()] == []
