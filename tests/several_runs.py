"""Several training runs one after another in one process group: ``torch.distributed.run ... several_runs.py RUNS``.

RUNS is a JSON file of [module, [flag, ...]] pairs. Starting torch once for all of them is what makes many two-rank
runs affordable.
"""

import json
import sys

from tiny import run_in_process

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    for module, flags in runs:
        sys.argv = [module, *flags]
        if run_in_process(module, *flags) != 0:
            sys.exit(f"{module} {' '.join(flags)} failed")
