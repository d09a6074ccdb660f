"""Plots of a report, each as the text of an SVG picture."""

import io
import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#8c8c8c", "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")
matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "svg.hashsalt": "pipa"})
matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6"})


def accuracy_bars(summaries: dict[str, dict]) -> str:
    """One bar a model, with its 95 % interval."""
    figure, axes = _figure(1)
    low_high = [summary["interval_95"] for summary in summaries.values()]
    heights = [100 * summary["accuracy"] for summary in summaries.values()]
    errors = [
        [height - 100 * low for height, (low, _) in zip(heights, low_high)],
        [100 * high - height for height, (_, high) in zip(heights, low_high)],
    ]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(heights))]
    axes[0].bar(list(summaries), heights, yerr=errors, capsize=5, color=colours, width=0.6, zorder=2)
    for index, (height, (_, high)) in enumerate(zip(heights, low_high)):
        axes[0].annotate(f"{height:.1f}", (index, 100 * high), (0, 4), textcoords="offset points", ha="center")
    axes[0].set_ylabel("accuracy, %")
    axes[0].set_ylim(0, min(108, 12 + max(100 * high for _, high in low_high)))
    axes[0].grid(axis="x", visible=False)
    return _svg(figure)


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
