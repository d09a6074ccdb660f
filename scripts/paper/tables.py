"""The tables of the paper, our accuracies beside the published ones: ``python scripts/paper/tables.py --work FOLDER``

Writes ``table1.md``, ``ablations.md`` and ``lr_grid.md`` into FOLDER/results. A cell is "published / ours (95 %
interval)"; a dash stands for what was not published, or has not been run.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BENCHMARKS, MODELS = ("gsm8k", "math"), ("deepseek", "qwen")
COLUMNS = tuple(f"{benchmark}_{model}" for benchmark in BENCHMARKS for model in MODELS)
NAMES = {"gsm8k": "GSM8K", "math": "MATH", "deepseek": "DS", "qwen": "QW"}
SIZES = {"gsm8k": 1319, "math": 5000}
NOTE = "Published / ours in percent (95 % interval); DS: DeepSeek-Math-7B-Instruct, QW: Qwen2.5-Math-7B-Instruct."


def published() -> list[dict[str, str]]:
    """The rows of ``published.tsv``: table, run, algorithm, and an accuracy a column or an empty text."""
    with open(Path(__file__).with_name("published.tsv"), newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def summary(work: Path, run: str, column: str) -> dict | None:
    """The summary of a finished evaluation; None where there is none."""
    benchmark, model = column.split("_")
    path = work / model / f"{run}_{benchmark}" / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def ours(work: Path, run: str, column: str) -> str:
    """Accuracy and interval; with the number of problems where they are not the whole test set."""
    found = summary(work, run, column)
    if found is None:
        return "-"
    low, high = (100 * bound for bound in found["interval_95"])
    text = f"{100 * found['accuracy']:.2f} ({low:.1f} to {high:.1f}"
    return f"{text})" if found["n"] == SIZES[column.split("_")[0]] else f"{text}, {found['n']} problems)"


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def beside(work: Path, rows: list[dict[str, str]], columns: tuple[str, ...]) -> str:
    """A table of published rows and what was run of them."""
    heading = ["", *(" ".join(NAMES[part] for part in column.split("_")) for column in columns)]
    cells = [
        [row["algorithm"], *(f"{row[column] or '-'} / {ours(work, row['run'], column)}" for column in columns)]
        for row in rows
    ]
    return table(heading, cells)


def own(work: Path, runs: list[str], columns: tuple[str, ...]) -> str:
    """A table of runs for which nothing was published."""
    heading = ["", *(" ".join(NAMES[part] for part in column.split("_")) for column in columns)]
    return table(heading, [[run, *(ours(work, run, column) for column in columns)] for run in runs])


def runs_like(work: Path, pattern: str) -> list[str]:
    """Names of the evaluated runs that fit a pattern of file names."""
    found = (path.name.rsplit("_", 1)[0] for model in MODELS for path in work.glob(f"{model}/{pattern}_*"))
    evaluated = (run for run in found if any(summary(work, run, column) for column in COLUMNS))
    return sorted(set(evaluated))


def pages(work: Path) -> dict[str, str]:
    """Text by file name."""
    rows = published()
    of_deepseek = tuple(column for column in COLUMNS if column.endswith("deepseek"))
    first = beside(work, [row for row in rows if row["table"] == "1"], COLUMNS)
    result = {"table1.md": f"# Table 1\n{NOTE}\n\n{first}\n\nThe model after SFT:\n\n{own(work, ['sft'], COLUMNS)}\n"}
    parts = ["# Tables 2 to 4 and Figure 5", NOTE]
    for number in "234":
        parts += [f"## Table {number}", beside(work, [row for row in rows if row["table"] == number], of_deepseek)]
    swept = [*runs_like(work, "figure5_*"), "unpaired_step_pipa_m", "unpaired_step_pipa_n"]
    parts += ["## Figure 5", "The threshold of the last two is 0.5.", own(work, swept, of_deepseek)]
    result["ablations.md"] = "\n\n".join(parts) + "\n"
    grid = [run for row in rows if row["table"] == "1" for run in (row["run"], *runs_like(work, f"{row['run']}_lr*"))]
    result["lr_grid.md"] = (
        "# Learning rates\nThe rate of a run without one in its name is the paper's, see docs/paper.md.\n\n"
        f"{own(work, list(dict.fromkeys(grid)), COLUMNS)}\n"
    )
    return result


def main() -> None:
    """Write the files and print the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    work = parser.parse_args().work
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    for name, text in pages(work).items():
        (results / name).write_text(text)
    print(f"{(results / 'table1.md').read_text()}\n{results}")


if __name__ == "__main__":
    main()
