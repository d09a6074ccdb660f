"""Several training runs one after another in one process group: ``torch.distributed.run ... several_runs.py RUNS``.

RUNS is a JSON file of [module, [flag, ...]] pairs. Starting torch once for all of them is what makes many two-rank
runs affordable.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import run_in_process


def run_on_two_ranks(runs: list, jobs: Path, timeout: int) -> None:
    """Every [module, flags] of ``runs`` on two ranks, in one launch; ``jobs`` is a file to write them to."""
    jobs.write_text(json.dumps(runs))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__, str(jobs)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    for module, flags in runs:
        sys.argv = [module, *flags]
        if run_in_process(module, *flags) != 0:
            sys.exit(f"{module} {' '.join(flags)} failed")
