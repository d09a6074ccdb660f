"""Held-out accuracy over generated tokens, a curve an arm, of a run of scripts/verifiable.sh.

    python scripts/verifiable_curves.py --work FOLDER --tokenizer MODEL

Writes FOLDER/curves.svg and prints the table.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipa_openrlhf.data.json_rows import read_json_rows  # noqa: E402
from pipa_openrlhf.evaluate.report import Point, accuracy_curves  # noqa: E402
from pipa_openrlhf.evaluate.results import headline, read_summary, text_table  # noqa: E402

ARMS = {"dpo": "DPO, one pair a problem", "pipa": "PIPA-M, all answers"}


def generated(path: Path, tokenizer) -> int:
    """Tokens of the answers in a file of samples, with their ends."""
    rows = [row for _, row in read_json_rows(str(path))]
    ids = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    return sum(map(len, ids)) + sum(bool(row["finished"]) for row in rows)


def curves(work: Path, tokenizer) -> dict[str, list[Point]]:
    """For each arm the start and every round that was evaluated."""
    found = {}
    for arm, name in ARMS.items():
        points, tokens, number = [_point(0, work / "evaluate_start")], 0, 1
        while (work / f"evaluate_{arm}_{number}" / "summary.json").exists():
            tokens += generated(work / f"sampled_{1 if number == 1 else f'{arm}_{number}'}.jsonl", tokenizer)
            points.append(_point(tokens, work / f"evaluate_{arm}_{number}"))
            number += 1
        found[name] = points
    return found


def _point(tokens: int, folder: Path) -> Point:
    score = headline(read_summary(str(folder)))
    return Point(tokens, score["value"], *score["interval_95"])


def main() -> None:
    """Write the plot and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    options = parser.parse_args()
    from pipa_openrlhf.model.loading import load_tokenizer

    found = curves(options.work, load_tokenizer(options.tokenizer))
    rows: list[tuple[str, ...]] = [("arm", "round", "generated tokens", "accuracy", "95 % interval")]
    for name, points in found.items():
        for number, one in enumerate(points):
            interval = f"{one.low:.1%} to {one.high:.1%}"
            rows.append((name, str(number), f"{one.x:,}", f"{one.value:.1%}", interval))
    (options.work / "curves.svg").write_text(accuracy_curves(found, "generated tokens"), encoding="utf-8")
    print(f"{text_table(rows)}\n{options.work / 'curves.svg'}")


if __name__ == "__main__":
    main()
