"""Greedy accuracy of a model on a file of problems: one result a problem, and a summary with a 95 % interval.

An evaluation that was stopped goes on where it was, and one that is finished is only printed again. A folder that
holds another evaluation is refused, unless told to overwrite it.
"""

import os
import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.generate.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from pipa_openrlhf.evaluate.results import RESULTS_FILE, one_line, summarise, write_summary
    from pipa_openrlhf.generate.job import prepare_job, run_job
    from pipa_openrlhf.generate.problems import RowFile
    from pipa_openrlhf.generate.sampling import SamplingSettings

    config.check()
    folder = config.evaluate.folder
    if config.evaluate.overwrite:
        _delete_evaluation(folder)
    sampling = SamplingSettings(
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.evaluate.batch_size,
        seed=config.train.seed,
    )
    job = prepare_job(config, sampling)
    description = job.description()
    file = RowFile(os.path.join(folder, RESULTS_FILE), description)
    run_job(job, file, _make_row, "evaluating")
    summary = summarise(file.rows, description)
    write_summary(folder, summary)
    print(f"{one_line(summary)}: {folder}", flush=True)


def _delete_evaluation(folder: str) -> None:
    from pipa_openrlhf.evaluate.results import RESULTS_FILE, SUMMARY_FILE

    for name in (SUMMARY_FILE, RESULTS_FILE, f"{RESULTS_FILE}.settings.json"):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))


def _make_row(problem, answer) -> dict:
    from pipa_openrlhf.evaluate.grading import extract_answer, is_right

    return {
        "right": is_right(answer.text, problem.answer, answer.finished),
        "predicted": extract_answer(answer.text),
        "answer": problem.answer,
        "question": problem.question,
        "completion": answer.text,
        "finished": answer.finished,
        "num_tokens": answer.num_tokens,
    }


def cli() -> int:
    """Console entry point."""
    return run(main, "evaluate")


if __name__ == "__main__":
    sys.exit(cli())
