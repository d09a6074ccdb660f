"""Sample answers to problems and label them: data that train_pipa reads as it is.

Rows are ``{prompt, completion, label}``. An answer that was stopped for length is labelled wrong: it has no end, and
the end that training adds to it is not one that the model would be right to write. An empty answer is written as the
eos text, which training reads as the end and not as text.
"""

import sys
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.generate.config import SampleConfig

if TYPE_CHECKING:
    from pipa_openrlhf.evaluate.grading import Grader
    from pipa_openrlhf.generate.job import MakeRows
    from pipa_openrlhf.generate.problems import Problem
    from pipa_openrlhf.generate.sampling import Answer


def main(config: SampleConfig) -> None:
    from pipa_openrlhf.evaluate.grading import Grader, grader_name
    from pipa_openrlhf.generate.job import prepare_job, run_job
    from pipa_openrlhf.generate.sampling import SamplingSettings
    from pipa_openrlhf.generate.share import Share

    config.check()
    sampling = SamplingSettings(
        num_samples=config.sample.num_answers,
        temperature=config.sample.temperature,
        top_p=config.sample.top_p,
        max_new_tokens=config.sample.max_new_tokens,
        batch_size=config.sample.batch_size,
        seed=config.train.seed,
    )
    job = prepare_job(config, sampling)
    share = Share(job, config.sample.path, job.description())
    with Grader() as grader:
        run_job(share.job, share.file, _row_maker(grader, job.tokenizer.eos_token), "sampling")
    if (rows := share.merge()) is not None:
        print(f"{_summary(rows, config.sample.path)} (graded by {grader_name()})", flush=True)


def _row_maker(grader: "Grader", eos: str) -> "MakeRows":
    from pipa_openrlhf.evaluate.grading import extract_answer

    def make_rows(answered: list) -> list[list[dict]]:
        flat = [(problem, answer) for problem, answers in answered for answer in answers]
        pairs = [(extract_answer(answer.text) if answer.finished else None, one.answer) for one, answer in flat]
        labels = iter(grader.same(pairs))
        return [[row(problem, answer, next(labels)) for answer in answers] for problem, answers in answered]

    def row(problem: "Problem", answer: "Answer", label: bool) -> dict:
        return {
            "prompt": problem.question,
            "completion": answer.text or eos,
            "label": label,
            "answer": problem.answer,
            "predicted": extract_answer(answer.text),
            "finished": answer.finished,
        }

    return make_rows


def _summary(rows: list[dict], path: str) -> str:
    problems_by_label: dict[bool, set[str]] = {True: set(), False: set()}
    right = 0
    for row in rows:
        problems_by_label[row["label"]].add(row["problem_id"])
        right += row["label"]
    mixed = problems_by_label[True] & problems_by_label[False]
    text = (
        f"{len(rows)} answers to {len(problems_by_label[True] | problems_by_label[False])} problems: {right} right "
        f"({right / len(rows):.1%}), {len(rows) - right} wrong ({sum(not row['finished'] for row in rows)} stopped "
        f"for length); {len(mixed)} problems have both"
    )
    return f"{text}: {path}"


def cli() -> int:
    """Console entry point."""
    return run(main, "sample")


if __name__ == "__main__":
    sys.exit(cli())
