"""Accuracy of a model on problems: greedy, of several sampled answers, or of a search.

There is one result an answer, and a summary.

An evaluation that was stopped goes on where it was, and one that is finished is only printed again. A folder that
holds another evaluation is refused, unless told to overwrite it.
"""

import logging
import os
import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.generate.config import EvaluateConfig

log = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    from pipa_openrlhf.evaluate.grading import Grader
    from pipa_openrlhf.evaluate.results import RESULTS_FILE, one_line, row_maker, score_table, summarise, write_summary
    from pipa_openrlhf.generate.decoding import decode_of, head_description, sampling_of
    from pipa_openrlhf.generate.job import prepare_job, run_job
    from pipa_openrlhf.generate.share import Share

    config.check()
    folder = config.evaluate.folder
    if config.evaluate.overwrite and os.environ.get("RANK", "0") == "0":
        _delete_evaluation(folder)
    job = prepare_job(config, sampling_of(config))
    description = job.description() | head_description(config)
    share = Share(job, os.path.join(folder, RESULTS_FILE), description, keeps_parts=not config.evaluate.overwrite)
    if config.sbs.tree_dir is not None and share.file.rows:
        log.warning("--sbs.tree_dir gets no tree of what was answered before: --evaluate.overwrite answers all anew")
    with Grader() as grader:
        run_job(share.job, share.file, row_maker(grader), "evaluating", decode_of(config))
    rows = share.merge()
    if rows is None:
        return
    summary = summarise(rows, description)
    write_summary(folder, summary)
    if table := score_table(summary):
        print(f"{table}\n")
    print(f"{one_line(summary)}: {folder}", flush=True)


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
