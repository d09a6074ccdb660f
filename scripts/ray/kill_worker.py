"""Kill one Ray worker of a run from outside, with kill -9, once the run has made some steps.

``python scripts/ray/kill_worker.py METRICS_FILE STEPS PID``: PID is of the cluster's first process, the driver of a
local cluster or `ray start --block`; nobody else's workers are touched.
"""

import sys
import time
from pathlib import Path

import psutil


def main(metrics: Path, steps: int, pid: int) -> None:
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        if not psutil.pid_exists(pid):
            sys.exit(f"error: process {pid} has ended before step {steps} was in {metrics}")
        time.sleep(0.1)
    workers = [one for one in psutil.Process(pid).children(recursive=True) if "RayTrainWorker" in one.name()]
    workers[-1].kill()
    print(f"== killed worker {workers[-1].pid} of {len(workers)} after step {metrics.read_text().count(chr(10))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
