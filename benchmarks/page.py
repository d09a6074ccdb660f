"""The table and the plot of ``docs/performance.md``, put between markers."""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from inputs import ROOT
from matplotlib.figure import Figure
from targets import ARMS, Ratio

PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
# Columns: heading, data, whether of a first pass.
COLUMNS = (
    ("word problems", "words", False),
    ("their first pass", "words", True),
    ("GSM8K", "gsm8k", False),
    ("search trees", "trees", False),
)


def table(ratios: Mapping[tuple[str, str, bool], Ratio], columns=COLUMNS) -> str:
    """Markdown with a row for every arm that was measured, and a pair of columns for everything it was measured on."""
    kept = [column for column in columns if any((data, first) == column[1:] for data, _, first in ratios)]
    lines = ["| cost / ours | " + " | ".join(f"{heading}: time | FLOPs" for heading, *_ in kept) + " |"]
    lines.append("|---|" + "---|---|" * len(kept))
    for arm, name in ARMS.items():
        cells = []
        for _, data, first in kept:
            ratio = ratios.get((data, arm, first))
            time = "" if ratio is None else f"{ratio.seconds:.1f} ({ratio.low:.1f}-{ratio.high:.1f})"
            cells += [time, "" if ratio is None else f"{ratio.flops:.2f}"]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentence(ratios: Mapping[tuple[str, str, bool], Ratio]) -> str:
    """The times of later passes over the word problems, for the README."""
    measured = [(ratios["words", arm, False].seconds, arm) for arm in ARMS if ("words", arm, False) in ratios]
    others = [f"{ARMS[arm]} {time:.1f}" for time, arm in sorted(measured, reverse=True) if arm != "pipa_prompts"]
    return (
        "How many times as long as PIPA here a pass over eight sampled answers a problem takes, after the first one, "
        f"whole trainers on all sides: {', '.join(others)}."
    )


def picture(ratios: Mapping[tuple[str, str, bool], Ratio]) -> str:
    """SVG: a bar for every arm's time on the word problems and a dot for its FLOPs, ours as 1."""
    measured = [(name, ratios["words", arm, False]) for arm, name in ARMS.items() if ("words", arm, False) in ratios]
    measured.sort(key=lambda one: one[1].seconds)
    names = [ARMS["pipa"], *(name for name, _ in measured)]
    times, flops = ([1.0, *(getattr(ratio, part) for _, ratio in measured)] for part in ("seconds", "flops"))
    style = {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**style, "svg.hashsalt": "pipa"}):
        figure = Figure(figsize=(7.5, 0.5 + 0.42 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        colors = ["#1b7837"] + ["#b8b8b8"] * len(measured)
        axes.barh(names, times, color=colors, label="time")
        axes.plot(flops, names, "o", color="#333333", markersize=5, label="FLOPs")
        for name, time in zip(names, times):
            axes.annotate(f"{time:.1f}", (time, name), (4, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set_xlabel("cost of a pass over eight sampled answers a problem, ours = 1")
        axes.legend(frameon=False, loc="lower right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def between_markers(page: str, name: str, block: str) -> str:
    """``page`` with ``block`` in place of what stands between its two markers of that name.

    Raises:
        ValueError: it has not both of them, in order.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page lacks the markers {begin.strip()} and {end}")
    return f"{before}{begin}{block.rstrip()}\n{end}{after}"


def write(blocks: dict[str, str], svg: str | None, page: Path = PAGE) -> None:
    """Put blocks of Markdown, by their markers' names, into the page, and the picture beside it."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = between_markers(text, name, block)
    page.write_text(text, encoding="utf-8")
    if svg is not None:
        page.with_suffix(".svg").write_text(svg, encoding="utf-8")
