"""Evaluations and training runs as a plain-text table and one self-contained HTML page."""

import html
import json
import math
import os

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluation.results import RESULTS_FILE, read_summary

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
svg { max-width: 100%; height: auto; } p.note { color: #555; font-size: .9rem; }
"""
_COLUMNS = ("model", "accuracy", "95 % interval", "problems", "against {}", "95 % interval of it")


def read_metrics(folder: str) -> list[dict]:
    """Rows of a run's ``metrics.jsonl``; a torn last line, of a run still going, is left out.

    Raises:
        UserError: the folder has none.
    """
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no metrics of a training run there ({error})") from error
    if not rows:
        raise UserError(f"{path} is empty: the run has not finished a step")
    return rows


def comparison(folders: dict[str, str], baseline: str) -> list[tuple[str, ...]]:
    """Rows of the table, texts only, the header first.

    The interval of a difference is that of the mean per-problem difference, which is narrower than two separate
    intervals suggest, because both models answered the same problems. It is left out where they did not.
    """
    base = _rights(folders[baseline])
    header = tuple(column.format(baseline) for column in _COLUMNS)
    rows = [header]
    for name, folder in folders.items():
        summary = read_summary(folder)
        low, high = summary["interval_95"]
        rights = _rights(folder)
        row = (name, f"{summary['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(summary["n"]))
        if name == baseline or rights.keys() != base.keys():
            rows.append((*row, "", ""))
        else:
            difference, half = _paired_difference([rights[key] - base[key] for key in base])
            rows.append((*row, f"{difference:+.1f} points", f"{difference - half:+.1f} to {difference + half:+.1f}"))
    return rows


def text_table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def html_page(title: str, rows: list[tuple[str, ...]], sections: list[tuple[str, str, str]], commands: str) -> str:
    """``sections`` are heading, picture (SVG) and note."""
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(rows)]
    for heading, picture, note in sections:
        parts.append(f'<h2>{html.escape(heading)}</h2>{picture}<p class="note">{html.escape(note)}</p>')
    if commands:
        parts.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _html_table(rows: list[tuple[str, ...]]) -> str:
    def line(row: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _rights(folder: str) -> dict[str, int]:
    path = os.path.join(folder, RESULTS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the results of an evaluation ({error})") from error
    return {row["problem_id"]: int(row["right"]) for row in rows}


def _paired_difference(differences: list[int]) -> tuple[float, float]:
    """Mean and half the 95 % interval, in points."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((difference - mean) ** 2 for difference in differences) / max(n - 1, 1)
    return 100 * mean, 196 * math.sqrt(variance / n)
