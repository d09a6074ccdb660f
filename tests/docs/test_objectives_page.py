"""docs/objectives.md shows what the command prints and every renamed flag."""

import re
from pathlib import Path

from tiny import run_in_process

from pipa_openrlhf.cli.flags import RENAMED, build_parser
from pipa_openrlhf.objectives.table import objectives

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text()


def test_the_table_is_what_the_command_prints(capsys):
    assert run_in_process("objectives") == 0
    printed = capsys.readouterr().out
    assert f"```\n{printed}```" in PAGE
    assert all(objective.name in printed for objective in objectives().values())


def test_every_renamed_flag_is_listed():
    listed = dict(re.findall(r"^\| `--(\w+)` \| `--([\w.]+)` \|$", PAGE, re.MULTILINE))
    assert listed == RENAMED


def test_flags_on_the_page_exist():
    known = {
        name
        for module in ("train_pipa", "train_dpo", "train_kto", "train_sft")
        for name in build_parser(module)._option_string_actions
    }
    named = set(re.findall(r"--[a-z]+\.[\w.]*\w", PAGE))
    assert len(named) > 30 and named <= known
