"""Accuracy of a model on problems, greedy or of several sampled answers: one result an answer, and a summary.

An evaluation that was stopped goes on where it was, and one that is finished is only printed again. A folder that
holds another evaluation is refused, unless told to overwrite it.
"""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.generate.config import EvaluateConfig

if TYPE_CHECKING:
    from pipa_openrlhf.generate.sampling import SamplingSettings


def main(config: EvaluateConfig) -> None:
    from pipa_openrlhf.evaluate.grading import Grader
    from pipa_openrlhf.evaluate.results import RESULTS_FILE, one_line, row_maker, score_table, summarise, write_summary
    from pipa_openrlhf.generate.sampling import prepare_job, run_job
    from pipa_openrlhf.generate.share import Share

    config.check()
    folder = config.evaluate.folder
    if config.evaluate.overwrite and os.environ.get("RANK", "0") == "0":
        _delete_evaluation(folder)
    job = prepare_job(config, _sampling(config))
    description = job.description()
    share = Share(job, os.path.join(folder, RESULTS_FILE), description)
    with Grader() as grader:
        run_job(share.job, share.file, row_maker(grader), "evaluating")
    rows = share.merge()
    if rows is None:
        return
    summary = summarise(rows, description)
    write_summary(folder, summary)
    if table := score_table(summary):
        print(f"{table}\n")
    print(f"{one_line(summary)}: {folder}", flush=True)


def _sampling(config: EvaluateConfig) -> "SamplingSettings":
    from pipa_openrlhf.generate.sampling import SamplingSettings

    flags = config.evaluate
    greedy = SamplingSettings(max_new_tokens=flags.max_new_tokens, batch_size=flags.batch_size, seed=config.train.seed)
    if flags.decode == "greedy":
        return greedy
    return replace(greedy, num_samples=flags.num_answers, temperature=flags.temperature, top_p=flags.top_p)


def _delete_evaluation(folder: str) -> None:
    from pipa_openrlhf.evaluate.results import RESULTS_FILE, SUMMARY_FILE

    for name in (SUMMARY_FILE, RESULTS_FILE, f"{RESULTS_FILE}.settings.json"):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))


def cli() -> int:
    """Console entry point."""
    return run(main, "evaluate")


if __name__ == "__main__":
    sys.exit(cli())
