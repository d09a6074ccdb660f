"""docs/flags.md, read as a person reads it, against the parser of every module."""

import os
import re
from pathlib import Path

import pytest

from pipa_openrlhf.cli.args import FLAG_GROUPS, TRAINING_MODULES, build_parser

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "flags.md").read_text()
REMEDY = "run python scripts/make_flags_page.py"


def page_rows() -> dict[str, list[str]]:
    """Cells of every row by flag: default, modules, meaning."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == 4 for row in cells)
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): row[1:] for row in cells}


def modules_of(cell: str) -> set[str]:
    named = {name for name in cell.split(", ") if name != "train_*"}
    return named | set(TRAINING_MODULES) if "train_*" in cell else named


def default_of(cell: str, module: str) -> str:
    """What the page says is the module's default; "" and "none" both say that there is none."""
    usual, *others = cell.split("; ")
    own = dict(other.split(": ", 1) for other in others).get(module, usual)
    return "" if own == "none" else own.strip("`")


@pytest.fixture
def parsers(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return {module: build_parser(module) for module in FLAG_GROUPS}


def actions(parser) -> dict:
    return {action.option_strings[-1]: action for action in parser._actions if action.dest != "help"}


@pytest.mark.parametrize("module", FLAG_GROUPS)
def test_the_page_has_the_flags_of_a_module_and_no_others(parsers, module):
    listed = {flag for flag, (_, modules, _) in page_rows().items() if module in modules_of(modules)}
    assert listed == set(actions(parsers[module])), REMEDY


@pytest.mark.parametrize("module", FLAG_GROUPS)
def test_the_page_shows_a_modules_own_defaults_and_help(parsers, module):
    rows = page_rows()
    parsed = vars(parsers[module].parse_args([]))
    for flag, action in actions(parsers[module]).items():
        default, _, meaning = rows[flag]
        value = parsed[action.dest]
        expected = "" if value is None else repr(value).replace(os.path.expanduser("~"), "~")
        if flag == "--logger.wandb.run_name":
            expected = "exp_<date>"
        assert default_of(default, module) == expected, f"{module} {flag}: {REMEDY}"
        assert action.help in meaning.replace("\\|", "|"), f"{module} {flag}: {REMEDY}"
        assert all(str(choice) in meaning for choice in action.choices or ()), f"{module} {flag}: {REMEDY}"


def test_modules_that_differ_are_told_apart():
    rows = page_rows()
    assert default_of(rows["--train.group_by_length"][0], "train_pipa") == "True"
    assert default_of(rows["--train.group_by_length"][0], "train_dpo") == "False"
    assert default_of(rows["--data.pairing"][0], "train_dpo") == "'given'"
    assert default_of(rows["--data.pairing"][0], "inspect_data") == "'unpaired'"
