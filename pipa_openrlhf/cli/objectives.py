"""Print the table of objectives: ``python -m pipa_openrlhf.cli.objectives``"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.flags import NoConfig

HEADER = ("objective", "prior on", "p(c=1|x)", "loss on the data", "level")


def main(config: NoConfig) -> None:
    """One line an objective."""
    from pipa_openrlhf.objectives.table import objectives

    rows: list[tuple[str, ...]] = [HEADER]
    rows += [
        (one.name, one.prior_constraint, one.class_prior, one.data_loss, one.level) for one in objectives().values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print("DPO with --model.label_smoothing is outside the family too.")


def cli() -> int:
    """Console entry point."""
    return run(main, "objectives")


if __name__ == "__main__":
    sys.exit(cli())
