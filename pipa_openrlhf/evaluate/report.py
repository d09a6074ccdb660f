"""Evaluations and training runs as a plain-text table and one self-contained HTML page."""

import html
import io
import math
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate import credit_page, tree_page
from pipa_openrlhf.evaluate.results import headline, mcnemar_p, read_results, read_summary, verdicts
from pipa_openrlhf.training.diagnosis import Finding

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
svg { max-width: 100%; height: auto; } p.note { color: #555; font-size: .9rem; }
"""
_COLUMNS = ("model", "accuracy", "95 % interval", "problems", "against {}", "95 % interval of it", "p")
_OLD_GRADER = "a version of this package without math-verify"


def comparison(folders: dict[str, str], baseline: str) -> list[tuple[str, ...]]:
    """Rows of the table, texts only, the header first.

    The interval of a difference is that of the mean per-problem difference, which is narrower than two separate
    intervals suggest, because both models answered the same problems. It and the p-value are left out where they did
    not.

    Raises:
        UserError: an evaluation cannot be read, or another grader made it.
    """
    summaries = {name: read_summary(folder) for name, folder in folders.items()}
    _check_graders(summaries)
    base = verdicts(read_results(folders[baseline]))
    rows = [tuple(column.format(baseline) for column in _COLUMNS)]
    for name, summary in summaries.items():
        score = headline(summary)
        low, high = score["interval_95"]
        shown = name if score["score"] == "accuracy" else f"{name} ({score['score']})"
        row = (shown, f"{score['value']:.1%}", f"{low:.1%} to {high:.1%}", str(summary["n"]))
        rights = verdicts(read_results(folders[name]))
        is_comparable = name != baseline and rights.keys() == base.keys()
        rows.append((*row, *(_against(rights, base) if is_comparable else ("", "", ""))))
    return rows


def footnote(folders: dict[str, str]) -> str:
    """What stands under the table."""
    grader = next(read_summary(folder).get("grader", _OLD_GRADER) for folder in folders.values())
    return f"p: exact McNemar test on the problems that one model alone solves. Graded by {grader}."


def _check_graders(summaries: dict[str, dict]) -> None:
    (first, grader), *others = ((name, summary.get("grader", _OLD_GRADER)) for name, summary in summaries.items())
    for name, other in others:
        if other != grader:
            raise UserError(
                f"{first} was graded by {grader} and {name} by {other}: evaluate them with the same version"
            )


def _against(rights: dict[str, bool], base: dict[str, bool]) -> tuple[str, str, str]:
    difference, half = _paired_difference([rights[key] - base[key] for key in base])
    p = mcnemar_p(sum(base[key] > rights[key] for key in base), sum(rights[key] > base[key] for key in base))
    interval = f"{difference - half:+.1f} to {difference + half:+.1f}"
    return f"{difference:+.1f} points", interval, f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def html_page(
    title: str, rows: list[tuple[str, ...]], note: str, sections: list[tuple[str, str, str]], commands: str
) -> str:
    """``sections`` are heading, picture (SVG, or HTML of our own) and note; ``note`` is the table's."""
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(rows), f'<p class="note">{html.escape(note)}</p>']
    for heading, picture, words in sections:
        parts.append(f'<h2>{html.escape(heading)}</h2>{picture}<p class="note">{html.escape(words)}</p>')
    if commands:
        parts.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre>")
    style = f"<style>{_STYLE}{tree_page.STYLE}{credit_page.STYLE}</style>"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>{style}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def findings_list(findings: dict[str, list[Finding]]) -> str:
    """What the metrics of each run show, a line a cause."""
    lines = [
        f"<li><b>{html.escape(name)}. {html.escape(one.cause)}</b>: {html.escape(one.evidence)}. "
        f"{html.escape(one.remedy)}</li>"
        for name, of_run in findings.items()
        for one in of_run
    ]
    return f'<ul class="findings">{"".join(lines)}</ul>'


def _html_table(rows: list[tuple[str, ...]]) -> str:
    def line(row: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _paired_difference(differences: list[int]) -> tuple[float, float]:
    """Mean and half the 95 % interval, in points."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((difference - mean) ** 2 for difference in differences) / max(n - 1, 1)
    return 100 * mean, 196 * math.sqrt(variance / n)


COLOURS = ("#8c8c8c", "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")
matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "svg.hashsalt": "pipa"})
matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6"})


class Point(NamedTuple):
    """An accuracy with its 95 % interval, at ``x``."""

    x: int
    value: float
    low: float
    high: float


def accuracy_bars(summaries: dict[str, dict]) -> str:
    """One bar a model, with its 95 % interval."""
    figure, axes = _figure(1)
    scores = [headline(summary) for summary in summaries.values()]
    points = [Point(0, score["value"], *score["interval_95"]) for score in scores]
    heights = [100 * one.value for one in points]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(heights))]
    axes[0].bar(list(summaries), heights, yerr=_errors(points), capsize=5, color=colours, width=0.6, zorder=2)
    for index, one in enumerate(points):
        place = (index, 100 * one.high)
        axes[0].annotate(f"{100 * one.value:.1f}", place, (0, 4), textcoords="offset points", ha="center")
    axes[0].set_ylabel("accuracy, %")
    axes[0].set_ylim(0, min(108, 12 + max(100 * one.high for one in points)))
    axes[0].grid(axis="x", visible=False)
    return _svg(figure)


def accuracy_curves(curves: dict[str, list[Point]], x_label: str) -> str:
    """Accuracy against something that grows, with 95 % intervals, one curve a name."""
    figure, axes = _figure(1)
    for index, (name, points) in enumerate(curves.items()):
        heights = [100 * one.value for one in points]
        colour, places = COLOURS[index + 1], [one.x for one in points]
        axes[0].errorbar(places, heights, _errors(points), fmt="o-", color=colour, capsize=4, label=name)
    axes[0].set(xlabel=x_label, ylabel="accuracy, %")
    axes[0].legend(frameon=False)
    return _svg(figure)


def _errors(points: list[Point]) -> list[list[float]]:
    """Below and above, in percent. At an accuracy of 0 or 1 rounding may leave the interval just beside it."""
    below = [max(0.0, 100 * (one.value - one.low)) for one in points]
    return [below, [max(0.0, 100 * (one.high - one.value)) for one in points]]


def value_likelihood(runs: dict[str, list[dict]]) -> str:
    """Likelihood that the value model gives to the labels, per optimizer step."""
    figure, axes = _figure(1)
    for index, (name, rows) in enumerate(runs.items()):
        _curve(axes[0], rows, "pipa/value_likelihood", COLOURS[(index + 2) % len(COLOURS)], "-", name)
    axes[0].axhline(0.5, color="#8c8c8c", linewidth=1, linestyle=":")
    axes[0].set_xlabel("optimizer step")
    axes[0].set_ylabel("likelihood of the labels")
    axes[0].legend(frameon=False)
    return _svg(figure)


def calibration_curves(tables: dict[str, list[dict]]) -> str:
    """Share of steps that are right against the value that they were given, one curve a table of bins."""
    figure, axes = _figure(1)
    for index, (name, bins) in enumerate(tables.items()):
        points = [(one["mean_value"], one["share_right"]) for one in bins]
        axes[0].plot(*zip(*points), "o-", color=COLOURS[index + 1], label=name)
    axes[0].plot((0, 1), (0, 1), color="#8c8c8c", linewidth=1, linestyle=":")
    axes[0].set(xlabel="mean g of a bin", ylabel="share of right steps", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes[0].legend(frameon=False)
    return _svg(figure)


def rewards(runs: dict[str, list[dict]]) -> str:
    """Rewards of right and wrong answers per optimizer step, one panel a run."""
    figure, axes = _figure(len(runs))
    for panel, (name, rows) in zip(axes, runs.items()):
        _curve(panel, rows, "rewards/chosen", COLOURS[3], "-", "right answers")
        _curve(panel, rows, "rewards/rejected", COLOURS[4], "--", "wrong answers")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("optimizer step")
    axes[0].set_ylabel("mean reward")
    axes[0].legend(frameon=False)
    return _svg(figure)


def has_values(rows: list[dict], key: str) -> bool:
    """True where a run logged numbers under ``key``; a null says that a batch had none."""
    return any(_is_number(row.get(key)) for row in rows)


def _curve(axes: Axes, rows: list[dict], key: str, colour: str, style: str, name: str) -> None:
    points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    if not points:
        return
    steps, values = zip(*points)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, _running_mean(values, max(1, len(values) // 15)), style, color=colour, linewidth=2, label=name)


def _running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Mean of each value and up to ``width`` neighbours on either side."""
    windows = [values[max(0, index - width) : index + width + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # A bare Figure needs no display and no global state.
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
