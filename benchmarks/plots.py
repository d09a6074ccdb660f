"""Pictures of the benchmarks' JSON results, one SVG file each.

    python benchmarks/plots.py RESULTS_FOLDER PICTURES_FOLDER

Draws what it finds of train_step.json, limit.json, scaling.json and memory_7b.json.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import GIB

BLUE, ORANGE, GREY = "#4c72b0", "#dd8452", "#8c8c8c"
matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "svg.hashsalt": "pipa"})
matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6"})


def train_step(result: dict) -> Figure:
    """Cost of every peer / ours, a panel a section; a dot is time, a bar is FLOPs."""
    figure, panels = _figure(len(result["sections"]))
    peers = [arm for arm in result["sections"][0]["timed"] if arm != "pipa"]
    for axes, section in zip(panels, result["sections"]):
        ours = section["timed"]["pipa"]["round"]
        flops = section["counted"]["pipa"]["round"]["flops"]
        axes.barh(
            peers, [section["counted"][arm]["round"]["flops"] / flops for arm in peers], color=BLUE, label="FLOPs"
        )
        seconds = statistics.median(one["seconds"] for one in ours)
        times = [statistics.median(one["seconds"] for one in section["timed"][arm]["round"]) for arm in peers]
        axes.plot([time / seconds for time in times], peers, "o", color=ORANGE, label="time")
        axes.axvline(1, color=GREY, linestyle=":")
        axes.invert_yaxis()
        axes.set_title(section["title"].replace(", ", ",\n", 1), fontsize=8)
        axes.set_xlabel("cost of the peer / ours")
    panels[0].legend()
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    return figure


def limit(result: dict) -> Figure:
    """What a step's FLOPs are spent on, as shares of the limit."""
    figure, (axes,) = _figure(1)
    models = {"measured model": result["parts"], **result["big"]}
    left = dict.fromkeys(models, 0.0)
    for index, part in enumerate(result["parts"]):
        if part == "anything else":
            continue
        widths = [parts[part] / (parts["2b"] + parts["2h"]) for parts in models.values()]
        axes.barh(list(models), widths, left=list(left.values()), color=f"C{index}", label=part)
        left = {name: left[name] + width for name, width in zip(models, widths)}
    axes.axvline(1.03, color=GREY, linestyle=":")
    axes.set_xlabel("counted FLOPs / limit (dotted: the target)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def scaling(result: dict) -> Figure:
    """Time and peak memory a token along every axis."""
    figure, panels = _figure(4, rows=2)
    for column, (name, points) in enumerate(result["axes"].items()):
        where, split = _AXES[name]
        for kind in dict.fromkeys(point[split] if split else "" for point in points):
            some = [point for point in points if not split or point[split] == kind]
            tokens = [point["sequences"] * point["length"] for point in some]
            places = [point[where] for point in some]
            times = [statistics.median(point["seconds"]) / count * 1e3 for point, count in zip(some, tokens)]
            memory = [point["peak_bytes"] / count / 1024 for point, count in zip(some, tokens)]
            label = {True: "prompt shared", False: "prompt repeated"}.get(kind, kind)
            panels[column].plot(places, times, "o-", label=label)
            panels[4 + column].plot(places, memory, "o-", label=label)
        panels[column].set_title(name)
        panels[4 + column].set_xlabel(name)
        for axes in (panels[column], panels[4 + column]):
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            if split:
                axes.legend(fontsize=7)
    panels[0].set_ylabel("ms a token")
    panels[4].set_ylabel("KiB a token")
    return figure


_AXES = {
    "sequence length": ("length", None),
    "batch size": ("sequences", None),
    "vocabulary": ("vocabulary", "head"),
    "answers a prompt": ("answers", "shares_prompts"),
}


def memory_7b(result: dict) -> Figure:
    """Peak memory of one pair, ours beside OpenRLHF's DPO, by what it is."""
    figure, panels = _figure(len(result["models"]))
    for axes, (model, found) in zip(panels, result["models"].items()):
        arms = found["one pair"]["checkpointing"]
        names = [name for name, parts in arms.items() if isinstance(parts, dict)]
        bottom = [0.0] * len(names)
        for part in arms[names[0]]:
            if part == "peak":
                continue
            heights = [arms[name][part] / GIB for name in names]
            axes.bar(names, heights, bottom=bottom, label=part, width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights)]
        axes.set_title(f"{model}, 2 x 2048 tokens, LoRA 64, checkpointing", fontsize=8)
        axes.set_ylabel("GiB")
    panels[-1].legend(fontsize=7)
    return figure


def _figure(columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


PICTURES: dict[str, Callable[[dict], Figure]] = {
    "train_step": train_step,
    "limit": limit,
    "scaling": scaling,
    "memory_7b": memory_7b,
}


def main() -> None:
    """Draw every result that is there."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/plots.py RESULTS_FOLDER PICTURES_FOLDER")
    results, pictures = map(Path, sys.argv[1:])
    for name, draw in PICTURES.items():
        path = results / f"{name}.json"
        if path.exists():
            draw(json.loads(path.read_text())).savefig(
                pictures / f"performance_{name}.svg", format="svg", metadata={"Date": None}
            )
            print(pictures / f"performance_{name}.svg")


if __name__ == "__main__":
    main()
