"""docs/resume.md lists what may change on resume, all of it and nothing else."""

import re
from pathlib import Path

from pipa_openrlhf.trainer.identity import MAY_CHANGE

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "resume.md"


def test_page_lists_what_may_change():
    section = PAGE.read_text().split("## What may change")[1].split("\n## ")[0]
    table = "\n".join(line.split("|")[2].split(":")[0] for line in section.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`--([\w.]+)`", table)) == MAY_CHANGE
