"""Results of an evaluation: one row a problem, and their summary."""

import json
import math
import os

from pipa_openrlhf.errors import UserError

RESULTS_FILE = "results.jsonl"
SUMMARY_FILE = "summary.json"


def summarise(rows: list[dict], description: dict) -> dict:
    """Accuracy with its 95 % Wilson interval, and what was evaluated how."""
    right = sum(row["right"] for row in rows)
    return {
        "accuracy": right / len(rows),
        "interval_95": list(wilson_interval(right, len(rows))),
        "right": right,
        "n": len(rows),
        "no_answer": sum(row["predicted"] is None for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
        **description,
    }


def one_line(summary: dict) -> str:
    low, high = summary["interval_95"]
    return (
        f"accuracy {summary['accuracy']:.1%} ({summary['right']} of {summary['n']}), "
        f"95 % interval {low:.1%} to {high:.1%}; {summary['no_answer']} without an answer"
    )


def write_summary(folder: str, summary: dict) -> None:
    """Written in one go: the file is there only once the evaluation is complete."""
    path = os.path.join(folder, SUMMARY_FILE)
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.unfinished", path)


def read_summary(folder: str) -> dict:
    """Summary of a finished evaluation.

    Raises:
        UserError: the folder holds none.
    """
    path = os.path.join(folder, SUMMARY_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no summary of a finished evaluation there; run pipa_openrlhf.cli.evaluate"
        ) from error


_NORMAL_QUANTILE_975 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen as ``successes`` out of ``n``."""
    z = _NORMAL_QUANTILE_975
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
