"""Public samples of the layouts, where they are at hand."""

import json
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[3].parent / "shared" / "data" / "layouts"


@pytest.fixture(scope="session")
def sample_rows():
    """``sample_rows("step_dpo.jsonl")``: rows of a sample file; skips the test where the samples are not."""

    def rows(name: str) -> list[dict]:
        path = SAMPLES / name
        if not path.exists():
            pytest.skip("the sample files are not at hand")
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]

    return rows
