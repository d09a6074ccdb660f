"""Write arithmetic word problems with worked steps, one JSONL a split, and the training split as rows for SFT."""

import json
import os
import sys
from itertools import islice
from types import SimpleNamespace

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generation.word_problems import SPLITS, WordProblem, generate_problems


def main(args: SimpleNamespace) -> None:
    flags = args.problems
    if flags.output_dir is None:
        raise UserError("--problems.output_dir is required")
    if flags.max_steps < 1:
        raise UserError(f"--problems.max_steps must be at least 1, got {flags.max_steps}")
    for split in SPLITS:
        if getattr(flags, split) < 0:
            raise UserError(f"--problems.{split} must not be negative, got {getattr(flags, split)}")
    os.makedirs(flags.output_dir, exist_ok=True)
    counts = []
    for split in SPLITS:
        size = getattr(flags, split)
        problems = list(islice(generate_problems(split, flags.seed, flags.max_steps), size))
        rows = [_problem_row(problem, f"{split}-{index}") for index, problem in enumerate(problems)]
        _write(os.path.join(flags.output_dir, f"{split}.jsonl"), rows)
        if split == "train":
            _write(os.path.join(flags.output_dir, "sft.jsonl"), [_sft_row(row) for row in rows])
        counts.append(f"{size} {split}")
    print(f"{', '.join(counts)}: {flags.output_dir}", flush=True)


def _problem_row(problem: WordProblem, problem_id: str) -> dict:
    return {
        "question": problem.question,
        "steps": list(problem.steps),
        "answer": problem.answer,
        "problem_id": problem_id,
    }


def _sft_row(row: dict) -> dict:
    return {
        "prompt": row["question"],
        "completion": "\n".join(row["steps"]),
        "label": True,
        "problem_id": row["problem_id"],
    }


def _write(path: str, rows: list[dict]) -> None:
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(f"{path}.unfinished", path)


def cli() -> int:
    """Console entry point."""
    return run(main, "make_problems")


if __name__ == "__main__":
    sys.exit(cli())
