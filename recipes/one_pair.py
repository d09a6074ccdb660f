"""One pair a problem from graded answers, as DPO-VP keeps it: rows of ``pipa_openrlhf.cli.sample`` to pairs.

    python -m recipes.one_pair --answers sampled.jsonl --output pairs.jsonl

The pair is the first right and the first wrong answer to a problem, which were drawn by chance. Where all answers to a
problem are right, or all are wrong, it has none. A row becomes ``{prompt, chosen, rejected}``.
"""

import json
import os
import sys
from dataclasses import dataclass

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import setting


@dataclass(frozen=True)
class PairsConfig:
    """Of this script."""

    answers: str | None = setting(None, "JSONL that `sample` wrote")
    output: str | None = setting(None, "JSONL to write")


def main(config: PairsConfig) -> None:
    """Write the pairs and print how many there are."""
    if config.answers is None or config.output is None:
        raise UserError(f"--{'answers' if config.answers is None else 'output'} is required")
    if not os.path.isfile(config.answers):
        raise UserError(f"--answers {config.answers}: no such file")
    problems: dict[str, dict[bool, dict]] = {}
    for where, row in read_json_rows(config.answers):
        if not isinstance(row.get("label"), bool) or not {"problem_id", "prompt", "completion"} <= row.keys():
            raise UserError(f"{where}: needs `problem_id`, `prompt`, `completion` and `label` as `sample` writes them")
        problems.setdefault(row["problem_id"], {}).setdefault(row["label"], row)
    pairs = [_pair(problem_id, of_label) for problem_id, of_label in problems.items() if len(of_label) == 2]
    if not pairs:
        raise UserError(f"--answers {config.answers}: no problem has both a right and a wrong answer")
    with open(f"{config.output}.unfinished", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    os.replace(f"{config.output}.unfinished", config.output)
    print(f"{len(pairs)} pairs of {len(problems)} problems: {config.output}", flush=True)


def _pair(problem_id: str, of_label: dict[bool, dict]) -> dict:
    return {
        "problem_id": problem_id,
        "prompt": of_label[True]["prompt"],
        "chosen": of_label[True]["completion"],
        "rejected": of_label[False]["completion"],
    }


if __name__ == "__main__":
    sys.exit(run(main, PairsConfig))
