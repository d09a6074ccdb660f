"""Write docs/flags.md from pipa_openrlhf/cli/args.py: ``python scripts/make_flags_page.py``"""

import os
from pathlib import Path

from pipa_openrlhf.cli.args import FLAG_GROUPS, TRAINING_MODULES, build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEADER = """# Flags

Every flag of every module, from `pipa_openrlhf/cli/args.py` (this page is written by
`python scripts/make_flags_page.py`). `train_*` modules take every flag of OpenRLHF's `train_dpo` with its meaning and
default; the exceptions are in [method.md](method.md#where-we-differ-from-openrlhf).

| flag | default | modules | meaning |
|---|---|---|---|
"""


def flags_page() -> str:
    """The page's text."""
    modules: dict[str, list[str]] = {}
    actions = {}
    for module in FLAG_GROUPS:
        for action in build_parser(module)._actions:
            name = action.option_strings[-1]
            if name != "--help":
                modules.setdefault(name, []).append(module)
                actions.setdefault(name, action)
    rows = []
    for name in sorted(actions):
        action = actions[name]
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        meaning = f"{action.help}{choices}".replace("|", "\\|")
        rows.append(f"| `{name}` | {_default(name, action.default)} | {_shown(modules[name])} | {meaning} |")
    return HEADER + "\n".join(rows) + "\n"


def _default(name: str, value) -> str:
    if name == "--logger.wandb.run_name":
        return "`exp_<date>`"
    if value is None:
        return ""
    text = repr(value) if isinstance(value, str) else str(value)
    return f"`{text.replace(os.path.expanduser('~'), '~')}`"


def _shown(modules: list[str]) -> str:
    if set(TRAINING_MODULES) <= set(modules):
        modules = ["train_*"] + [module for module in modules if module not in TRAINING_MODULES]
    return ", ".join(modules)


if __name__ == "__main__":
    PAGE.write_text(flags_page())
