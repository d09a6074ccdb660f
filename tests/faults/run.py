"""Kill real jobs at drawn moments, start each again, and see that it ends as if nothing had happened.

``python tests/faults/run.py --kills 50``: a line a kill, then ``survived 50, lost 0``, the work that was lost, and the
wall clock against undisturbed runs. Ends with 1 where a job was lost; its folder is left then.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from jobs import JOBS, Job  # noqa: E402
from killer import Kill, Killer  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="jobs to kill; they take turns")
    parser.add_argument("--seed", type=int, default=0, help="of jobs, targets and moments")
    parser.add_argument("--work", type=Path, help="folder for the jobs; default: one that is deleted")
    flags = parser.parse_args(argv)
    if flags.work is not None:
        return 0 if kill(flags.kills, flags.seed, flags.work) else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if kill(flags.kills, flags.seed, Path(folder)) else 1


def kill(count: int, seed: int, work: Path, of: Sequence[Job] = JOBS) -> bool:
    """Kill ``count`` jobs, print what became of them; whether all survived."""
    draw, killer = random.Random(seed), Killer(work)
    kills: list[Kill] = []
    try:
        for number in range(count):
            one = killer.kill_one(of[number % len(of)], number, draw)
            kills.append(one)
            print(_line(number + 1, one), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted after {len(kills)} of {count}")
    print(summary(kills), flush=True)
    return len(kills) == count and all(one.problem is None for one in kills)


def _line(number: int, one: Kill) -> str:
    end = "survived" if one.problem is None else f"LOST: {one.problem}"
    return (
        f"{number:3} {one.job.name:24} {one.target:18} {one.moment:40} lost {one.lost_steps} steps, "
        f"{one.lost_seconds:4.1f} s  {one.seconds / one.undisturbed_seconds:.2f}x  {end}"
    )


def summary(kills: Sequence[Kill]) -> str:
    """The figures of all kills."""
    lost = sum(one.problem is not None for one in kills)
    steps, seconds = [one.lost_steps for one in kills], [one.lost_seconds for one in kills]
    usual = sum(one.undisturbed_seconds for one in kills)
    ratio = sum(one.seconds for one in kills) / usual
    return (
        f"survived {len(kills) - lost}, lost {lost}\n"
        f"lost work: median {statistics.median(steps):g} steps and {statistics.median(seconds):.1f} s, "
        f"worst {max(steps)} steps and {max(seconds):.1f} s\n"
        f"wall clock: {ratio:.2f} times that of undisturbed jobs, which take {usual / len(kills):.0f} s each, "
        f"start-up included"
    )


if __name__ == "__main__":
    sys.exit(main())
