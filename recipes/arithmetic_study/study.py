"""The study: every row of Table 1 at its best learning rate, on several seeds, as tables, plots and raw results.

    python -m recipes.arithmetic_study.study --work runs/study --workers 2

Run again, it goes on where it stopped; what another design changes is run anew. ``--part`` runs an ablation instead,
on the models and answers of the table.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.results import read_summary
from pipa_openrlhf.settings import check_bounds, setting
from pipa_openrlhf.training.run_lock import alone_in
from recipes.arithmetic_study import design, parts
from recipes.arithmetic_study.design import Row, Sizes
from recipes.arithmetic_study.results import Table, write_results
from recipes.arithmetic_study.stages import Runner, Stage

HEADLINE = "headline"


@dataclass(frozen=True)
class StudyConfig:
    """Of this script."""

    work: str | None = setting(None, "folder of models, answers and results", is_written=True)
    part: str = setting(HEADLINE, "what is run", choices=(HEADLINE, *parts.PARTS))
    smoke: bool = setting(False, "every stage at toy size: shows that it runs, not what comes out")
    workers: int = setting(1, "stages that run at a time, each on one core", least=1)
    sizes: Sizes = field(default_factory=Sizes)


def main(config: StudyConfig) -> None:
    """Run what is missing, and write the results."""
    if config.work is None:
        raise UserError("--work is required")
    check_bounds(config)
    config.sizes.check()
    sizes = design.SMOKE if config.smoke else config.sizes
    with alone_in(config.work):
        runner = Runner(config.work, config.workers, lambda line: print(line, flush=True))
        runner.run(design.preparation(sizes))
        rates = choose_rates(runner, design.headline(), sizes)
        rows = design.headline()
        if config.part != HEADLINE:
            # The rows that these are compared with come first.
            changed = parts.PARTS[config.part]()
            runner.run(parts.preparation(config.part, changed, rates, sizes))
            rates |= choose_rates(runner, [row for row in changed if not row.keeps_rate], sizes)
            rows = [row for row in rows if row.name in {one.changes for one in changed}] + changed
        runner.run(final_runs(rows, rates, sizes))
        table = Table(rows, rates, sizes.seeds, config.work)
        print(write_results(os.path.join(config.work, "results"), config.part, table), flush=True)


def choose_rates(runner: Runner, rows: list[Row], sizes: Sizes) -> dict[str, float]:
    """Learning rate by row: the one of highest mean validation accuracy over the seeds, of equal ones the lowest.

    While a row's best is at an end of what was tried, another one beyond that end is.
    """
    tried = {row.name: sorted(set(sizes.rates)) for row in rows}

    def accuracy(row: Row, rate: float) -> float:
        names = [design.run_name(row, rate, seed) for seed in range(sizes.seeds)]
        return fmean(read_summary(runner.path(f"{name}_validation"))["accuracy"] for name in names)

    while True:
        runner.run(_validations(rows, tried, sizes))
        best = {row.name: max(tried[row.name], key=lambda rate: accuracy(row, rate)) for row in rows}
        beyond = {name: next_rate(rates, best[name]) for name, rates in tried.items()}
        growing = [
            name for name in tried if beyond[name] and len(tried[name]) < len(set(sizes.rates)) + sizes.more_rates
        ]
        if not growing:
            for name in [name for name in tried if beyond[name]]:
                runner.say(f"{name}: the best learning rate, {best[name]:g}, is at the end of those that were tried")
            return best
        for name in growing:
            tried[name] = sorted([*tried[name], beyond[name]])


def next_rate(tried: list[float], best: float) -> float:
    """As far beyond the end of ``tried`` as its neighbour is within, to one digit; 0 where the best is at no end."""
    for end, beside in ((tried[0], tried[1:2]), (tried[-1], tried[-2:-1])):
        if best == end and beside:
            found = float(f"{end * end / beside[0]:.0e}")
            return found if (found - end) * (end - beside[0]) > 0 else 0.0
    return 0.0


def _validations(rows: list[Row], tried: dict[str, list[float]], sizes: Sizes) -> Iterator[Stage]:
    for seed in range(sizes.seeds):
        for row in rows:
            for rate in tried[row.name]:
                yield design.training(row, rate, seed, sizes)
                yield design.evaluation(design.run_name(row, rate, seed), "validation")


def final_runs(rows: list[Row], rates: dict[str, float], sizes: Sizes) -> list[Stage]:
    """Every row at its learning rate on every seed, and its answers to the test problems."""
    stages: list[Stage] = []
    for seed in range(sizes.seeds):
        for row in rows:
            rate = rates[row.rate_of]
            name = design.run_name(row, rate, seed)
            stages += [design.training(row, rate, seed, sizes), design.evaluation(name, "test")]
    return stages


if __name__ == "__main__":
    sys.exit(run(main, StudyConfig))
