"""Sample answers to problems and label them: data that train_pipa reads as it is.

Rows are ``{prompt, completion, label}``, or with ``--sample.label_steps`` ``{prompt, completions, labels}``, one step
a line of the answer. An answer that was stopped for length is labelled wrong: it has no end, and the end that training
adds to it is not one that the model would be right to write. An empty answer is written as the eos text, which
training reads as the end and not as text.
"""

import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError


def main(args: SimpleNamespace) -> None:
    from pipa_openrlhf.generation.job import prepare_job, run_job
    from pipa_openrlhf.generation.problem_file import require_steps
    from pipa_openrlhf.generation.row_file import RowFile
    from pipa_openrlhf.generation.sampling import SamplingSettings

    if args.sample.output is None:
        raise UserError("--sample.output is required")
    if not args.sample.temperature >= 0:
        raise UserError(f"--sample.temperature must be at least 0, got {args.sample.temperature}")
    if not 0 < args.sample.top_p <= 1:
        raise UserError(f"--sample.top_p must be above 0 and at most 1, got {args.sample.top_p}")
    sampling = SamplingSettings(
        num_samples=args.sample.num_answers,
        temperature=args.sample.temperature,
        top_p=args.sample.top_p,
        max_new_tokens=args.sample.max_new_tokens,
        batch_size=args.sample.batch_size,
        seed=args.train.seed,
    )
    job = prepare_job(args, sampling)
    if args.sample.label_steps:
        require_steps(job.problems, args.problems.file)
    file = RowFile(args.sample.output, job.description() | {"label_steps": args.sample.label_steps})
    run_job(job, file, _row_maker(args.sample.label_steps, job.tokenizer.eos_token), "sampling")
    print(_summary(file.rows, args.sample.output), flush=True)


def _row_maker(with_steps: bool, eos: str) -> Callable:
    from pipa_openrlhf.evaluation.grading import extract_answer, is_right
    from pipa_openrlhf.evaluation.step_labels import label_steps, split_steps

    def make_row(problem, answer) -> dict:
        right = answer.finished and is_right(answer.text, problem.answer)
        text = answer.text or eos
        row = {"prompt": problem.question}
        if with_steps:
            steps = split_steps(text)
            row |= {"completions": steps, "labels": label_steps(steps, problem.steps, right)}
        else:
            row |= {"completion": text, "label": right}
        predicted = extract_answer(answer.text)
        return row | {"answer": problem.answer, "predicted": predicted, "finished": answer.finished}

    return make_row


def _summary(rows: list[dict], path: str) -> str:
    problems_by_label = {True: set(), False: set()}
    steps = Counter()
    right = 0
    for row in rows:
        label = row["labels"][-1] if "labels" in row else row["label"]
        problems_by_label[label].add(row["problem_id"])
        steps.update(row.get("labels", ()))
        right += label
    mixed = problems_by_label[True] & problems_by_label[False]
    text = (
        f"{len(rows)} answers to {len(problems_by_label[True] | problems_by_label[False])} problems: {right} right "
        f"({right / len(rows):.1%}), {len(rows) - right} wrong ({sum(not row['finished'] for row in rows)} stopped "
        f"for length); {len(mixed)} problems have both"
    )
    if steps:
        text += f"; {steps[True]} right steps, {steps[False]} wrong steps"
    return f"{text}: {path}"


def cli() -> int:
    """Console entry point."""
    return run(main, "sample")


if __name__ == "__main__":
    sys.exit(cli())
