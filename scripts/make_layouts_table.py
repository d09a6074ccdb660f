"""Write the table of layouts into docs/data.md from the layouts' modules: ``python scripts/make_layouts_table.py``"""

import importlib
import json
from pathlib import Path

from pipa_openrlhf.data.layouts import LAYOUTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
BEGIN, END = "<!-- layouts: written by scripts/make_layouts_table.py -->\n", "<!-- end of layouts -->\n"


def layouts_table() -> str:
    """The table's text."""
    rows = ["| `--data.format` | a row | how it is read |", "|---|---|---|"]
    for name in LAYOUTS:
        layout = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}")
        example = json.dumps(layout.EXAMPLE, ensure_ascii=False).replace("|", "\\|")
        rows.append(f"| `{name}` | `{example}` | {layout.READING.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + layouts_table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
