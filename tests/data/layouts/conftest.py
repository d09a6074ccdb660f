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


@pytest.fixture
def read(read_records):
    """Layout and what training sees of each record: steps, step labels, answer label, whether it ends."""

    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        return name, [(one.steps, one.step_labels, one.answer_label, one.complete) for one in records]

    return read
