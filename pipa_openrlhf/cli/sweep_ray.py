"""A grid of trainings on a Ray cluster, each evaluated on held-out problems: ``sweep_ray --sweep.file grid.yaml ...``

The prior is scored once for all. Started again, a sweep goes on, and does nothing twice.
"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.distributed.ray_sweep import SweepConfig
from pipa_openrlhf.settings import with_absolute_paths


def main(config: SweepConfig) -> int:
    """Check every flag of every trial, run those that have not finished, and write the table; 1 where one failed."""
    config.check()
    from pipa_openrlhf.cli.grid import read_grid
    from pipa_openrlhf.distributed.ray_sweep import Sweep, run_sweep
    from pipa_openrlhf.evaluate.sweep_table import markdown
    from pipa_openrlhf.training.run_lock import alone_in

    config = with_absolute_paths(config)
    folder = str(config.sweep.output_dir)
    sweep = Sweep(folder, read_grid(str(config.sweep.file)), config.ray.ranks_per_trial)
    with alone_in(folder, "--sweep.output_dir"):
        run_sweep(config, sweep)
    print(f"\n{markdown(sweep.rows)}", flush=True)
    return int(any(row.state == "failed" for row in sweep.rows))


def cli() -> int:
    """Console entry point."""
    return run(main, "sweep_ray")


if __name__ == "__main__":
    sys.exit(cli())
