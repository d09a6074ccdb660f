"""Write the study's problems and its model with random weights.

    python -m recipes.arithmetic_study.make_problems --output_dir FOLDER

One JSONL of problems a split, for sampling one a seed; ``base.jsonl`` and ``sft.jsonl`` are worked answers instead.
"""

import os
import random
import sys
from dataclasses import dataclass
from itertools import islice

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import check_bounds, setting
from recipes.arithmetic_study.problems import Chain, Teacher, generate_chains
from recipes.word_problems.problems import write_rows


@dataclass(frozen=True)
class ProblemsConfig:
    """Of this script."""

    output_dir: str | None = setting(None, "gets the files, and the model in `random`")
    base: int = setting(24000, "answers of the teacher that the base model learns from", least=1)
    sft: int = setting(200, "right answers for SFT", least=1)
    sample: int = setting(200, "problems to sample answers to, of each seed", least=1)
    validation: int = setting(300, "problems to choose a learning rate on", least=1)
    test: int = setting(1000, "held-out problems", least=1)
    sets: int = setting(8, "sets of problems to sample answers to, one a seed", least=1)
    teacher_answers: int = setting(0, "answers of the teacher to each of those, as `sample` writes a model's", least=0)
    flaw: float = setting(0.65, "how often the teacher forgets a ten, on average", least=0, most=1)
    spread: float = setting(0.35, "the pairs' own rates are that average plus and minus up to this", least=0, most=1)
    least: int = setting(2, "fewest operations of a problem", least=1)
    most: int = setting(4, "most operations of a problem", least=1)
    hidden_size: int = setting(64, "of the model", least=8)
    layers: int = setting(4, "of the model", least=1)


def main(config: ProblemsConfig) -> None:
    """Write the files."""
    from recipes.arithmetic_study.model import save_model

    if config.output_dir is None:
        raise UserError("--output_dir is required")
    check_bounds(config)
    if not 0 <= config.flaw - config.spread or not config.flaw + config.spread <= 1:
        raise UserError(f"--spread {config.spread}: --flaw {config.flaw} plus and minus it must be between 0 and 1")
    if config.least > config.most:
        raise UserError(f"--least {config.least} is more than --most {config.most}")
    os.makedirs(config.output_dir, exist_ok=True)
    flawed, right = Teacher(config.flaw, config.spread), Teacher()

    def write(name: str, split: str, size: int, seed: int, teacher: Teacher | None = None) -> None:
        chains = islice(generate_chains(split, seed, config.least, config.most), size)
        rng = random.Random(f"answers:{split}:{seed}")
        if teacher is None:
            rows = [_problem_row(chain, f"{name}-{index}") for index, chain in enumerate(chains)]
        else:
            rows = [_answer_row(chain, teacher.steps(chain, rng)) for chain in chains]
        write_rows(os.path.join(config.output_dir, f"{name}.jsonl"), rows)

    write("base", "base", config.base, 0, flawed)
    write("sft", "sft", config.sft, 0, right)
    write("validation", "validation", config.validation, 0)
    write("test", "test", config.test, 0)
    for seed in range(config.sets):
        write(f"sample{seed}", "sample", config.sample, seed)
        chains = islice(generate_chains("sample", seed, config.least, config.most), config.sample)
        answers = _sampled_rows(list(chains), f"sample{seed}", config.teacher_answers, flawed, seed)
        if answers:
            write_rows(os.path.join(config.output_dir, f"teacher{seed}.jsonl"), answers)
    size = save_model(os.path.join(config.output_dir, "random"), config.hidden_size, config.layers)
    print(f"{config.output_dir}: problems, and a model of {size} parameters", flush=True)


def _problem_row(chain: Chain, problem_id: str) -> dict:
    steps = Teacher().steps(chain, random.Random(0))
    answer = steps[-1].removeprefix("#### ")
    return {"question": chain.question, "steps": steps, "answer": answer, "problem_id": problem_id}


def _answer_row(chain: Chain, steps: list[str]) -> dict:
    # The base model learns from all that its teacher wrote: `label` says what is trained on, not what is right.
    return {"prompt": chain.question, "completion": "\n".join(steps), "label": True}


def _sampled_rows(chains: list[Chain], name: str, answers: int, teacher: Teacher, seed: int) -> list[dict]:
    """``answers`` of the teacher to each problem, labelled."""
    rng = random.Random(f"sampled:{seed}")
    rows = []
    for index, chain in enumerate(chains):
        problem = _problem_row(chain, f"{name}-{index}")
        for sample in range(answers):
            completion = "\n".join(teacher.steps(chain, rng))
            label = completion.endswith(problem["steps"][-1])
            more = {"problem_id": problem["problem_id"], "sample": sample}
            rows.append({"prompt": chain.question, "completion": completion, "label": label, **more})
    return rows


if __name__ == "__main__":
    sys.exit(run(main, ProblemsConfig))
