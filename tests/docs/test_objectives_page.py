"""docs/objectives.md shows what the command prints, docs/from_openrlhf.md every renamed flag."""

import re
from pathlib import Path

from tiny import run_in_process

from pipa_openrlhf.cli.flags import RENAMED, build_parser
from pipa_openrlhf.objectives.table import objectives

DOCS = Path(__file__).resolve().parents[2] / "docs"
OBJECTIVES = (DOCS / "objectives.md").read_text()
FROM_OPENRLHF = (DOCS / "from_openrlhf.md").read_text()


def test_the_table_is_what_the_command_prints(capsys):
    assert run_in_process("objectives") == 0
    printed = capsys.readouterr().out
    assert f"```\n{printed}```" in OBJECTIVES
    assert all(objective.name in printed for objective in objectives().values())


def test_every_renamed_flag_is_listed():
    listed = dict(re.findall(r"^\| `--(\w+)` \| `--([\w.]+)` \|$", FROM_OPENRLHF, re.MULTILINE))
    assert listed == RENAMED


def test_flags_on_both_pages_exist():
    known = {
        name
        for module in ("train_pipa", "train_dpo", "train_kto", "train_sft")
        for name in build_parser(module)._option_string_actions
    }
    named = set(re.findall(r"--[a-z]+\.[\w.]*\w", OBJECTIVES + FROM_OPENRLHF))
    assert len(named) > 30 and named <= known
