"""Compare evaluations and training runs: a table on the terminal, and one self-contained HTML page."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import setting

if TYPE_CHECKING:
    from pipa_openrlhf.training.diagnosis import Finding


@dataclass(frozen=True)
class ReportSettings:
    """What is compared, and where the page goes."""

    output: str = setting("report.html", "HTML file to write")
    pictures: str | None = setting(None, "folder that gets each plot as an SVG file; unset: none")
    title: str = setting("Evaluation report", "heading")
    evaluations: Sequence[str] = setting((), "NAME=FOLDER, output folders of evaluate", nargs="+")
    runs: Sequence[str] = setting((), "NAME=FOLDER, output folders of training, with metrics.jsonl", nargs="+")
    trees: Sequence[str] = setting((), "files of --sbs.tree_dir, each a search to draw", nargs="+")
    credit: Sequence[str] = setting((), "NAME=FILE, files of credit: tokens coloured by g and log-ratio", nargs="+")
    baseline: str | None = setting(None, "what the others are compared with; unset: the first")
    commands: str | None = setting(None, "text file with the commands that made the results")


@dataclass(frozen=True)
class ReportConfig:
    """Of this command."""

    report: ReportSettings = field(default_factory=ReportSettings)


def main(config: ReportConfig) -> None:
    from pipa_openrlhf.evaluate import report
    from pipa_openrlhf.evaluate.results import text_table
    from pipa_openrlhf.training.diagnosis import diagnose
    from pipa_openrlhf.training.records import read_args, read_metrics

    flags = config.report
    folders = _named(flags.evaluations, "--report.evaluations")
    if not folders:
        raise UserError("--report.evaluations is required: NAME=FOLDER of one or more evaluations")
    baseline = flags.baseline or next(iter(folders))
    if baseline not in folders:
        raise UserError(f"--report.baseline {baseline}: not one of {', '.join(folders)}")
    run_folders = _named(flags.runs, "--report.runs")
    runs = {name: read_metrics(folder) for name, folder in run_folders.items()}
    for name, steps in runs.items():
        if not steps:
            raise UserError(f"--report.runs {name}={run_folders[name]}: the run has not finished a step")
    diagnosed = {name: diagnose(rows, read_args(run_folders[name]) or {}) for name, rows in runs.items()}
    findings = {name: of_run for name, of_run in diagnosed.items() if of_run}
    rows = report.comparison(folders, baseline)
    sections = _sections(folders, runs) + _findings(findings) + _credit(flags.credit) + _trees(flags.trees)
    note = report.footnote(folders)
    page = report.html_page(flags.title, rows, note, sections, _read_text(flags.commands))
    os.makedirs(os.path.dirname(os.path.abspath(flags.output)), exist_ok=True)
    with open(flags.output, "w", encoding="utf-8") as file:
        file.write(page)
    if flags.pictures:
        _write_pictures(flags.pictures, sections)
    words = [f"{name}. {one}" for name, of_run in findings.items() for one in of_run]
    print("\n".join([text_table(rows), "", note, *words, flags.output]), flush=True)


def _write_pictures(folder: str, sections: list[tuple[str, str, str]]) -> None:
    os.makedirs(folder, exist_ok=True)
    for heading, picture, _ in sections:
        if not picture.startswith("<svg"):
            continue
        with open(os.path.join(folder, f"{heading.lower().replace(' ', '_')}.svg"), "w", encoding="utf-8") as file:
            file.write(picture)


def _sections(folders: dict[str, str], runs: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """Heading, picture and note of each plot that has data."""
    from pipa_openrlhf.evaluate import report as plots
    from pipa_openrlhf.evaluate.results import read_summary

    summaries = {name: read_summary(folder) for name, folder in folders.items()}
    note = "On held-out problems. Error bars: 95 % intervals, Wilson's for one answer a problem, else by bootstrap."
    sections = [("Accuracy", plots.accuracy_bars(summaries), note)]
    judged = {name: rows for name, rows in runs.items() if plots.has_values(rows, "pipa/value_likelihood")}
    if judged:
        note = (
            "Geometric mean over an answer's tokens of the probability that the value model gives to their labels, "
            "averaged over the answers of a batch. An untrained value model is at 0.5."
        )
        sections.append(("Value model", plots.value_likelihood(judged), note))
    rewarded = {name: rows for name, rows in runs.items() if plots.has_values(rows, "rewards/chosen")}
    if rewarded:
        note = "Sum over an answer's tokens of log policy - log prior, averaged over the answers of a batch."
        sections.append(("Rewards", plots.rewards(rewarded), note))
    return sections


def _findings(findings: "dict[str, list[Finding]]") -> list[tuple[str, str, str]]:
    from pipa_openrlhf.evaluate.report import findings_list

    if not findings:
        return []
    note = "Usual causes of a run that learns little, where its metrics show them. A run without one is not listed."
    return [("What the metrics show", findings_list(findings), note)]


def _credit(words: Sequence[str]) -> list[tuple[str, str, str]]:
    from pipa_openrlhf.evaluate.credit_page import by_problem, problem_html, read_credit

    files = {name: read_credit(path) for name, path in _named(words, "--report.credit", "FILE").items()}
    note = (
        "Each token by g, the probability that it is right before it is read, and by r, its log-ratio of policy and "
        "prior; below each step its label."
    )
    # Where data name no problems, their names are the prompts.
    return [
        (f"Answers to problem {shorten(problem, 60, placeholder=' ...')}", problem_html(answers), note)
        for problem, answers in by_problem(files).items()
    ]


def _trees(paths: Sequence[str]) -> list[tuple[str, str, str]]:
    from pipa_openrlhf.evaluate.tree_page import read_tree, tree_html

    sections = []
    for path in paths:
        tree = read_tree(path)
        note = f"A step of the search below the one it continues, with its value. The right answer is {tree['gold']}."
        sections.append((f"Search of problem {tree['problem_id']}", tree_html(tree), note))
    return sections


def _named(words: Sequence[str], flag: str, kind: str = "FOLDER") -> dict[str, str]:
    named = {}
    for word in words:
        name, separator, folder = word.partition("=")
        if not (name and separator and folder):
            raise UserError(f"{flag} {word}: expected NAME={kind}")
        if name in named:
            raise UserError(f"{flag}: the name {name} was given twice")
        named[name] = folder
    return named


def _read_text(path: str | None) -> str:
    if path is None:
        return ""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--report.commands {path}: cannot be read ({error})") from error


def cli() -> int:
    """Console entry point."""
    return run(main, "report")


if __name__ == "__main__":
    sys.exit(cli())
