"""Write docs/flags.md from the dataclasses of settings: ``python scripts/make_flags_page.py``"""

import argparse
import os
from pathlib import Path

from pipa_openrlhf.cli.flags import MODULES, build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEADER = """# Flags

Every flag of every module, a column a module. The settings themselves are dataclasses, in `pipa_openrlhf/config.py`,
the `config.py` of `pipa_openrlhf/data/`, `generate/` and `annotate/`, and beside each loss in
`pipa_openrlhf/objectives/`; this page is written by `python scripts/make_flags_page.py`. The `train_*` modules take
every flag of OpenRLHF's `train_dpo` with its meaning and default; the exceptions are in
[from_openrlhf.md](from_openrlhf.md#flags-that-differ).
`train` takes the flags of the family that `--objective` names, here PIPA's.

"""


def flags_page() -> str:
    """The page's text."""
    by_flag: dict[str, dict[str, argparse.Action]] = {}
    for module in MODULES:
        for action in build_parser(module)._actions:
            name = action.option_strings[-1]
            if name != "--help":
                by_flag.setdefault(name, {})[module] = action
    rows = [f"| flag | default | {' | '.join(MODULES)} | meaning |", "|---" * (len(MODULES) + 3) + "|"]
    for name, actions in sorted(by_flag.items()):
        action = next(iter(actions.values()))
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        meaning = f"{action.help}{choices}".replace("|", "\\|")
        marks = " | ".join("x" if module in actions else "" for module in MODULES)
        rows.append(f"| `{name}` | {_default(name, action.default)} | {marks} | {meaning} |")
    return HEADER + "\n".join(rows) + "\n"


def _default(name: str, value: object) -> str:
    if name == "--logger.wandb.run_name":
        return "`exp_<date>`"
    if value is None:
        return ""
    text = repr(value) if isinstance(value, str) else str(value)
    return f"`{text.replace(os.path.expanduser('~'), '~')}`"


if __name__ == "__main__":
    PAGE.write_text(flags_page())
