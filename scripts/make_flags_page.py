"""Write docs/flags.md from pipa_openrlhf/cli/args.py: ``python scripts/make_flags_page.py``"""

import argparse
import os
from pathlib import Path

from pipa_openrlhf.cli.args import FLAG_GROUPS, TRAINING_MODULES, build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEADER = """# Flags

Every flag of every module, from `pipa_openrlhf/cli/args.py` (this page is written by
`python scripts/make_flags_page.py`). `train_*` modules take every flag of OpenRLHF's `train_dpo` with its meaning and
default; the exceptions are in [method.md](method.md#where-we-differ-from-openrlhf). Where a module has a default of
its own, it stands after the module's name.

| flag | default | modules | meaning |
|---|---|---|---|
"""


def flags_page() -> str:
    """The page's text."""
    by_flag: dict[str, dict[str, argparse.Action]] = {}
    for module in FLAG_GROUPS:
        for action in build_parser(module)._actions:
            name = action.option_strings[-1]
            if name != "--help":
                by_flag.setdefault(name, {})[module] = action
    rows = []
    for name, actions in sorted(by_flag.items()):
        action = next(iter(actions.values()))
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        meaning = f"{action.help}{choices}".replace("|", "\\|")
        rows.append(f"| `{name}` | {_defaults(name, actions)} | {_shown(list(actions))} | {meaning} |")
    return HEADER + "\n".join(rows) + "\n"


def _defaults(name: str, actions: dict[str, argparse.Action]) -> str:
    """The default of most modules, then those of the others: "`True`; train_dpo: `False`"."""
    shown = {module: _default(name, action.default) for module, action in actions.items()}
    usual = max(shown.values(), key=list(shown.values()).count)
    others = [f"{module}: {text or 'none'}" for module, text in shown.items() if text != usual]
    return "; ".join([usual or "none", *others]) if others else usual


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
