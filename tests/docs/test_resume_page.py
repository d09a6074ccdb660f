"""docs/resume.md lists what may change on resume, all of it and nothing else."""

import re
from pathlib import Path

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.settings import MAY_CHANGE, settings_of

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "resume.md"


def test_page_lists_what_may_change():
    section = PAGE.read_text().split("## What may change")[1].split("\n## ")[0]
    table = "\n".join(line.split("|")[2].split(":")[0] for line in section.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`--([\w.]+)`", table)) == {
        one.name for one in settings_of(RunConfig()) if one.spec.role == MAY_CHANGE
    }
