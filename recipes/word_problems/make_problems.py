"""Write arithmetic word problems with worked steps, one JSONL a split, and the training split as rows for SFT.

python -m recipes.word_problems.make_problems --output_dir FOLDER
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import check_bounds, setting
from recipes.word_problems.problems import SPLITS, WordProblem, generate_problems, write_rows


@dataclass(frozen=True)
class ProblemsConfig:
    """Of this script."""

    output_dir: str | None = setting(None, "gets one JSONL a split, and sft.jsonl")
    train: int = setting(640, "problems with worked answers for SFT", least=0)
    sample: int = setting(800, "problems to sample answers to", least=0)
    validation: int = setting(200, "problems to choose a learning rate on", least=0)
    test: int = setting(600, "held-out problems", least=0)
    max_steps: int = setting(2, "most equations in a worked answer", least=1)
    largest_value: int = setting(20, "largest result of an equation", least=6)
    train_turned: float = setting(
        0.08, "share of training problems whose words suggest the other operation", least=0, most=1
    )
    turned: float = setting(0.5, "that share in the other splits", least=0, most=1)
    seed: int = setting(0, "another seed gives other problems of the same splits")


def main(config: ProblemsConfig) -> None:
    """Write the files."""
    if config.output_dir is None:
        raise UserError("--output_dir is required")
    check_bounds(config)
    os.makedirs(config.output_dir, exist_ok=True)
    counts = []
    for split in SPLITS:
        size = getattr(config, split)
        turned = config.train_turned if split == "train" else config.turned
        generator = generate_problems(split, config.seed, config.max_steps, turned, config.largest_value)
        problems = list(islice(generator, size))
        rows = [_problem_row(problem, f"{split}-{index}") for index, problem in enumerate(problems)]
        write_rows(os.path.join(config.output_dir, f"{split}.jsonl"), rows)
        if split == "train":
            write_rows(os.path.join(config.output_dir, "sft.jsonl"), [_sft_row(row) for row in rows])
        counts.append(f"{size} {split}")
    print(f"{', '.join(counts)}: {config.output_dir}", flush=True)


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


if __name__ == "__main__":
    sys.exit(run(main, ProblemsConfig))
