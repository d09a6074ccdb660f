"""docs/from_trl.md names the defaults of both sides."""

import dataclasses
import re
from pathlib import Path

import pytest
from trl import DPOConfig, KTOConfig

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.settings import settings_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_trl.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `--([\w.]+)` \| ([^|]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("theirs", [DPOConfig, KTOConfig])
def test_defaults(theirs):
    there = {field.name: field.default for field in dataclasses.fields(theirs)}
    config = RunConfig()
    here = {one.name: one.value(config) for one in settings_of(config)} | {"model.beta": config.model.beta}
    assert len(ROWS) == 12
    for name, default, flag, ours in ROWS:
        assert (str(there[name]), str(here[flag])) == (default, ours.split(" ")[0]), name
