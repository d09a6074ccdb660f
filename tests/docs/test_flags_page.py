"""docs/flags.md, read as a person reads it, against the parser of every module."""

import os
import re
from pathlib import Path

import pytest

from pipa_openrlhf.cli.flags import MODULES, build_parser

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "flags.md").read_text()
REMEDY = "run python scripts/make_flags_page.py"


def page_rows() -> dict[str, list[str]]:
    """Cells of every row by flag: default, a mark a module, meaning."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(MODULES) + 3 for row in cells)
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): row[1:] for row in cells}


def modules_of(row: list[str]) -> set[str]:
    return {module for module, mark in zip(MODULES, row[1:-1], strict=True) if mark}


@pytest.fixture
def parsers(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return {module: build_parser(module) for module in MODULES}


def actions(parser) -> dict:
    return {action.option_strings[-1]: action for action in parser._actions if action.dest != "help"}


@pytest.mark.parametrize("module", MODULES)
def test_the_page_has_the_flags_of_a_module_and_no_others(parsers, module):
    listed = {flag for flag, row in page_rows().items() if module in modules_of(row)}
    assert listed == set(actions(parsers[module])), REMEDY


@pytest.mark.parametrize("module", MODULES)
def test_the_page_shows_a_modules_own_defaults_and_help(parsers, module):
    rows = page_rows()
    parsed = vars(parsers[module].parse_args([]))
    for flag, action in actions(parsers[module]).items():
        default, meaning = rows[flag][0].strip("`"), rows[flag][-1]
        value = parsed[action.dest]
        expected = "" if value is None else repr(value).replace(os.path.expanduser("~"), "~")
        if flag == "--logger.wandb.run_name":
            expected = "exp_<date>"
        assert default == expected, f"{module} {flag}: {REMEDY}"
        assert action.help in meaning.replace("\\|", "|"), f"{module} {flag}: {REMEDY}"
        assert all(str(choice) in meaning for choice in action.choices or ()), f"{module} {flag}: {REMEDY}"


def test_modules_that_differ_are_told_apart():
    rows = page_rows()
    assert "train_sft" in modules_of(rows["--data.keep"]) and "train_pipa" not in modules_of(rows["--data.keep"])
