"""The table of layouts in docs/data.md is that of the code, and its examples are read as they are."""

import importlib
import json
import re
from pathlib import Path

import pytest

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts import LAYOUTS, choose_reading

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "data.md"


def rows() -> dict[str, list[str]]:
    found = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [example.replace("\\|", "|"), reading.replace("\\|", "|")] for name, example, reading in found}


def test_every_layout_has_its_row():
    assert list(rows()) == list(LAYOUTS), "run python scripts/make_layouts_table.py"
    for name, (example, reading) in rows().items():
        layout = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}")
        assert (json.loads(example), reading) == (layout.EXAMPLE, layout.READING), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_example_is_found_and_read(name):
    row = json.loads(rows()[name][0])
    # The columns of best_of_n are those of steps elsewhere: only the user can tell.
    flags = DataConfig(format=name) if name == "best_of_n" else DataConfig()
    reading = choose_reading([("data.jsonl line 1", row)], "data.jsonl", flags)
    assert reading.layout == name
    assert reading.records(row, "data.jsonl line 1", 0)


def test_the_layout_of_ones_own_that_the_page_shows(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "my_layout.py"
    path.write_text(code.group(1))
    row = {"task": "Q", "text": "A", "verdict": "fine"}
    reading = choose_reading([("x line 1", row)], "x", DataConfig(layout_module=str(path)))
    [record] = reading.records(row, "x line 1", 0)
    assert (reading.layout, record.prompt, record.steps, record.answer_label) == ("my_layout", "Q", ["A"], 1)
