"""Results of the study: means over seeds, paired comparisons and metrics, as Markdown, JSON and raw answers."""

import gzip
import json
import math
import os
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from pipa_openrlhf.evaluate.results import read_results, read_summary
from pipa_openrlhf.training.records import read_metrics
from recipes.arithmetic_study.design import CONTROL, SETTINGS, Row, run_name

_RESAMPLES = 2000
# Means over the last quarter of a run's steps.
METRICS = {
    "logratio/chosen": "log-ratio of right answers",
    "logratio/rejected": "log-ratio of wrong answers",
    "pipa/F_chosen": "F of right tokens",
    "pipa/F_rejected": "F of wrong tokens",
    "pipa/clip_fraction": "clipped wrong tokens",
    "pipa/value_likelihood": "likelihood of the labels under g",
    "pipa/gradient_rejected": "gradient of wrong tokens",
    "pipa/gradient_spread": "spread of the gradient",
}


@dataclass(frozen=True)
class Table:
    """Rows that were run on ``seeds`` seeds in ``work``, with the learning rate of each."""

    rows: list[Row]
    rates: dict[str, float]
    seeds: int
    work: str

    def rate(self, row: Row) -> float:
        """The learning rate of a row, its own or another row's."""
        return self.rates[row.rate_of]

    def runs(self, row: Row) -> list[str]:
        """Folders of its runs, one a seed."""
        names = [run_name(row, self.rate(row), seed) for seed in range(self.seeds)]
        return [os.path.join(self.work, name) for name in names]

    def rights(self, row: Row) -> np.ndarray:
        """[seeds, problems] 1 where the answer to a test problem is right; problems in the order of their ids."""
        return np.array([_rights(f"{run}_test") for run in self.runs(row)])

    def validation(self, row: Row) -> float | None:
        """Accuracy by which learning rates were chosen, mean over seeds; None for rows that take another's."""
        folders = [f"{run}_validation" for run in self.runs(row)]
        if not all(map(os.path.isdir, folders)):
            return None
        return fmean(read_summary(folder)["accuracy"] for folder in folders)

    def baseline(self, row: Row) -> Row | None:
        """What a row is compared with: of a PIPA row of Table 1 the best other row of its setting on the validation
        problems; of an ablation the row that it changes."""
        if row.changes:
            return next((one for one in self.rows if one.name == row.changes), None)
        others = [one for one in self.rows if one.setting == row.setting and not one.is_pipa and not one.changes]
        return max(others, key=lambda one: self.validation(one) or 0.0) if row.is_pipa and others else None


def _rights(folder: str) -> list[float]:
    rows = sorted(read_results(folder), key=lambda row: row["problem_id"])
    return [float(row["right"]) for row in rows]


@dataclass(frozen=True)
class Difference:
    """Between two rows on the same problems and seeds, in shares.

    Attributes:
        low, high: 95 % bootstrap interval, seeds and problems both drawn anew.
        p: two-sided, by turning round the sign of each problem's mean difference over seeds.
    """

    mean: float
    low: float
    high: float
    p: float


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Args: [seeds, problems] each."""
    differences = ours - theirs
    seeds, problems = differences.shape
    draws = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        some = differences[draws.integers(0, seeds, seeds)].mean(axis=0)
        means.append(some[draws.integers(0, problems, problems)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    of_problem = differences.mean(axis=0)
    signs = draws.integers(0, 2, (_RESAMPLES, problems)) * 2 - 1
    turned = np.abs((signs * of_problem).mean(axis=1))
    # The data themselves are one of the ways to turn them round.
    p = (1 + np.sum(turned >= abs(of_problem.mean()) - 1e-12)) / (1 + _RESAMPLES)
    return Difference(float(of_problem.mean()), float(low), float(high), float(p))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of [seeds] values; NaN for one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def diagnostics(table: Table, row: Row) -> dict[str, float | None]:
    """:data:`METRICS` of a row, means over seeds; None where a method has no such metric."""
    steps = [one for run in table.runs(row) for one in _last_quarter(read_metrics(run))]

    def mean(name: str) -> float | None:
        values = [step[name] for step in steps if step.get(name) is not None]
        return float(np.mean(values)) if values else None

    return {name: mean(name) for name in METRICS}


def _last_quarter(rows: list[dict]) -> list[dict]:
    return rows[-max(1, len(rows) // 4) :]


def write_results(folder: str, part: str, table: Table) -> str:
    """Write ``PART.md``, ``PART.json``, ``PART_answers.jsonl.gz`` and the plots. Returns the text of the table."""
    from recipes.arithmetic_study.plots import write_plots

    os.makedirs(folder, exist_ok=True)
    records = [_record(table, row) for row in table.rows]
    text = "\n\n".join([_start(table), accuracy_table(table, records), diagnostics_table(records)]) + "\n"
    with open(os.path.join(folder, f"{part}.md"), "w", encoding="utf-8") as file:
        file.write(text)
    with open(os.path.join(folder, f"{part}.json"), "w", encoding="utf-8") as file:
        json.dump(records, file, indent=1)
        file.write("\n")
    _write_answers(os.path.join(folder, f"{part}_answers.jsonl.gz"), table)
    write_plots(folder, part, table, records)
    return f"{text}\n{folder}"


def _record(table: Table, row: Row) -> dict:
    rights = table.rights(row)
    of_seeds = rights.mean(axis=1)
    record = {
        "name": row.name,
        "setting": row.setting,
        "method": row.method,
        "learning_rate": table.rate(row),
        "validation": table.validation(row),
        "test": [float(one) for one in of_seeds],
        "mean": float(of_seeds.mean()),
        "standard_error": standard_error(of_seeds),
        "problems": rights.shape[1],
        "metrics": diagnostics(table, row),
    }
    control = next((one for one in table.rows if one.name == CONTROL and row.name != CONTROL), None)
    for name, other in (("against", table.baseline(row)), ("against_sft", control)):
        if other is not None:
            difference = compare(rights, table.rights(other))
            record[name] = {"of": other.name, "method": other.method, **vars(difference)}
    return record


def _start(table: Table) -> str:
    folder = os.path.join(table.work, "sft_test")
    summary = read_summary(folder)
    return (
        f"All rows start from the model after SFT, which has {100 * summary['accuracy']:.1f} % of the "
        f"{summary['n']} test problems right."
    )


def accuracy_table(table: Table, records: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| data | method | lr | validation | test | seeds | against | difference | p | against SFT | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda one: _place(one["setting"])):
        cells = [
            *(record["setting"], record["method"], f"{record['learning_rate']:g}", _percent(record["validation"])),
            f"{_percent(record['mean'])} ± {_percent(record['standard_error'])}",
            " ".join(map(_percent, record["test"])),
        ]
        for name in ("against", "against_sft"):
            found = record.get(name)
            cells += [found["method"] if found else ""] if name == "against" else []
            cells += [_difference(found), _p_value(found["p"])] if found else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Test: mean over seeds ± standard error over seeds, in percent. Differences in points with 95 % intervals, "
        f"bootstrapped over seeds and problems; p: sign-flip test over problems. {table.seeds} seeds."
    )
    return "\n".join([*lines, "", note])


def _place(setting: str) -> int:
    return SETTINGS.index(setting) if setting in SETTINGS else -1


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _difference(found: dict) -> str:
    return f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def diagnostics_table(records: list[dict]) -> str:
    """Markdown."""
    lines = [f"| data | method | {' | '.join(METRICS.values())} |", "|---" * (2 + len(METRICS)) + "|"]
    for record in sorted(records, key=lambda one: _place(one["setting"])):
        values = [record["metrics"][name] for name in METRICS]
        cells = ["-" if value is None else f"{value:.3g}" for value in values]
        lines.append(f"| {record['setting']} | {record['method']} | {' | '.join(cells)} |")
    note = (
        "Means over the last quarter of the steps and over seeds. Log-ratios are sums over an answer, in nats. "
        "Gradient: of token losses, by log f; spread: 1 where all tokens pull alike, near 0 where few do."
    )
    return "\n".join([*lines, "", note])


def _write_answers(path: str, table: Table) -> None:
    """Every test answer of every run, one a line, without what is the same in all."""
    # Without a time in it, so that the same answers are the same file.
    with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        for row in table.rows:
            for seed, run in enumerate(table.runs(row)):
                for one in sorted(read_results(f"{run}_test"), key=lambda result: result["problem_id"]):
                    kept = {name: one[name] for name in ("problem_id", "right", "predicted")}
                    line = json.dumps({"row": row.name, "seed": seed, **kept})
                    file.write(f"{line}\n".encode())
