"""Plots of the study as SVG files."""

import math
import os

from matplotlib.figure import Figure

from pipa_openrlhf.evaluate.report import COLOURS
from pipa_openrlhf.training.records import read_metrics
from recipes.arithmetic_study.results import Table

_CURVES = {
    "pipa/value_likelihood": ("figure3", "likelihood of the labels under g"),
    "logratio/chosen": ("figure4_right", "log-ratio of right answers, nats"),
    "logratio/rejected": ("figure4_wrong", "log-ratio of wrong answers, nats"),
}


def write_plots(folder: str, part: str, table: Table, records: list[dict]) -> None:
    """Accuracy of each row, and the paper's Figures 3 and 4 on the first seed."""
    _save(accuracy_bars(records), os.path.join(folder, f"{part}_accuracy.svg"))
    for metric, (name, label) in _CURVES.items():
        _save(curves(table, metric, label), os.path.join(folder, f"{part}_{name}.svg"))


def accuracy_bars(records: list[dict]) -> Figure:
    """Test accuracy with its standard error over seeds."""
    figure = Figure(figsize=(8.6, 0.8 + 0.3 * len(records)), layout="constrained")
    axes = figure.subplots()
    names = [f"{record['setting']}: {record['method']}" for record in records]
    errors = [0 if math.isnan(one["standard_error"]) else 100 * one["standard_error"] for one in records]
    colours = [COLOURS[1] if "PIPA" in record["method"] else COLOURS[0] for record in records]
    axes.barh(names, [100 * one["mean"] for one in records], xerr=errors, color=colours, capsize=3, zorder=2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy, %")
    return figure


def curves(table: Table, metric: str, label: str) -> Figure:
    """A metric by optimizer step, a line a row that logs it, first seed."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(table.rows):
        steps = read_metrics(table.runs(row)[0])
        points = [(one["step"], one[metric]) for one in steps if one.get(metric) is not None]
        if points:
            style = ("-", "--", ":", "-.")[index // len(COLOURS) % 4]
            axes.plot(*zip(*points), style, color=COLOURS[index % len(COLOURS)], label=f"{row.setting}: {row.method}")
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _save(figure: Figure, path: str) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
