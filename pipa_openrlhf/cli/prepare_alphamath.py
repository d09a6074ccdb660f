"""From AlphaMath's raw file to the answers that every run of the paper reads, with the counts of each set.

    python -m pipa_openrlhf.cli.prepare_alphamath --input round3_training_data.json --output_dir data/alphamath \
        --regrade gsm8k_train.jsonl math_train.jsonl

One file is written, ``answers.jsonl``, in the layout of the raw one: SFT, paired and unpaired data, labels of answers
and of steps are all read from it, by the flags that the table names. ``counts.json`` holds the same counts.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import Reading
from pipa_openrlhf.data.layouts.alphamath import TOOL_OUTPUT, read_path, read_q_values
from pipa_openrlhf.data.record import BadRow, Record, check_bad_rows, report_bad_rows, write_bad_rows
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import check_bounds, setting

if TYPE_CHECKING:
    from pipa_openrlhf.evaluate.grading import Grader

ANSWERS_FILE, COUNTS_FILE = "answers.jsonl", "counts.json"
# Where Figure 5 may be looked at: the share of right steps is printed for each.
THRESHOLDS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0)
_AT_ONCE = 2000  # rows that are graded together


@dataclass(frozen=True)
class PrepareConfig:
    """Of this command."""

    input: str | None = setting(None, "AlphaMath's raw file, or its hub name", is_path=True)
    output_dir: str | None = setting(None, f"gets {ANSWERS_FILE} and {COUNTS_FILE}", is_written=True)
    regrade: Sequence[str] = setting(
        (),
        "files of GSM8K's and MATH's training problems: an answer labelled wrong whose result is right is left out",
        nargs="+",
    )
    on_error: str = setting(
        "fail", "a row that cannot be read ends the command, or is left out and listed", choices=("fail", "skip")
    )
    max_error_share: float = setting(0.01, "most rows left out by --on_error skip, as a share", least=0, most=1)

    def check(self) -> None:
        """Raises UserError."""
        check_bounds(self)
        for flag, value in (("--input", self.input), ("--output_dir", self.output_dir)):
            if value is None:
                raise UserError(f"{flag} is required")
        if os.path.exists(self.answers_path):
            raise UserError(f"{self.answers_path} exists: delete it, or choose another --output_dir")

    @property
    def answers_path(self) -> str:
        """The file that is written."""
        return os.path.join(str(self.output_dir), ANSWERS_FILE)


@dataclass(frozen=True)
class Answer:
    """A row that could be read."""

    row: dict
    record: Record
    q_values: list[float]


@dataclass
class Counts:
    """What was read and what was kept.

    Attributes:
        rows: of the raw file, those that could not be read included.
        right, wrong: answers kept.
        right_characters, wrong_characters: of the prompts and answers kept.
        steps_of_right, steps_of_wrong: steps of the answers kept.
        right_steps_of_wrong: how many of the latter are right, by threshold.
        graded: answers with a gold answer; the next two are among them.
        wrong_format: labelled wrong with a right result, left out.
        not_confirmed: labelled right, though the grader finds another result or none; kept.
    """

    rows: int = 0
    right: int = 0
    wrong: int = 0
    right_characters: int = 0
    wrong_characters: int = 0
    steps_of_right: int = 0
    steps_of_wrong: int = 0
    right_steps_of_wrong: Counter[float] = field(default_factory=Counter)
    graded: int = 0
    wrong_format: int = 0
    not_confirmed: int = 0
    right_by_problem: Counter[str] = field(default_factory=Counter)
    wrong_by_problem: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        """Count an answer that is kept."""
        record, q_values = answer.record, answer.q_values
        characters = len(record.prompt) + sum(map(len, record.steps))
        if record.answer_label:
            self.right += 1
            self.right_characters += characters
            self.steps_of_right += len(q_values)
            self.right_by_problem[record.problem_id] += 1
        else:
            self.wrong += 1
            self.wrong_characters += characters
            self.steps_of_wrong += len(q_values)
            self.wrong_by_problem[record.problem_id] += 1
            for threshold in THRESHOLDS:
                self.right_steps_of_wrong[threshold] += sum(q >= threshold for q in q_values)

    @property
    def pairs(self) -> int:
        """Pairs of a right and a wrong answer that problems have, each answer in one pair."""
        return sum(min(count, self.wrong_by_problem[problem]) for problem, count in self.right_by_problem.items())

    @property
    def problems(self) -> int:
        return len(self.right_by_problem | self.wrong_by_problem)

    def as_json(self) -> dict:
        """Everything but the counts of single problems."""
        values = {name: value for name, value in vars(self).items() if not name.endswith("_by_problem")}
        return {**values, "pairs": self.pairs, "problems": self.problems}

    def table(self, path: str) -> list[str]:
        """A line a data set of the paper: its counts, and the flags that read it."""
        sets = {
            "SFT": (self.right, 0, "train_sft"),
            "unpaired": (self.right, self.wrong, "train_pipa, train_kto"),
            "paired": (self.pairs, self.pairs, "any module, --data.pairing match"),
        }
        lines = [f"{'set':10}{'right':>9}{'wrong':>9}  read by, with --data.dataset {path}"]
        lines += [f"{name:10}{right:9}{wrong:9}  {flags}" for name, (right, wrong, flags) in sets.items()]
        lines.append("labels of answers: --data.annotation answer; of steps: --data.annotation step, of which")
        lines.append(f"    {self.steps_of_right} steps of right answers are right;")
        lines.append(f"    of {self.steps_of_wrong} steps of wrong answers are right, by --data.step_threshold:")
        lines.append("    " + ", ".join(f"{t:g}: {self.right_steps_of_wrong[t]}" for t in THRESHOLDS))
        return lines


def main(config: PrepareConfig) -> None:
    """Read, regrade, write and count; the whole file is never in memory."""
    config.check()
    from pipa_openrlhf.evaluate.grading import Grader

    name, folder = str(config.input), str(config.output_dir)
    golds = read_golds(config.regrade)
    flags = DataConfig(format="alphamath", on_error=config.on_error, max_error_share=config.max_error_share)
    counts = Counts()
    bad: list[BadRow] = []
    os.makedirs(folder, exist_ok=True)
    unfinished = f"{config.answers_path}.unfinished"
    with open(unfinished, "w", encoding="utf-8") as file, Grader() as grader:
        answers = _answers(name, flags, counts, bad)
        while chunk := list(islice(answers, _AT_ONCE)):
            for answer in _without_wrong_formats(chunk, golds, grader, counts):
                file.write(json.dumps(answer.row) + "\n")
                counts.add(answer)
    try:
        check_bad_rows(bad, counts.rows, name, flags)
    except UserError as error:  # which names the flags of training data
        raise UserError(str(error).replace("--data.", "--")) from error
    if golds and not counts.graded:
        raise UserError(f"{name}: no question is one of --regrade {' '.join(config.regrade)}: give training problems")
    report_bad_rows(bad, counts.rows, name)
    write_bad_rows(folder, bad)
    with open(os.path.join(folder, COUNTS_FILE), "w", encoding="utf-8") as file:
        json.dump(counts.as_json(), file, indent=1)
        file.write("\n")
    os.replace(unfinished, config.answers_path)
    print("\n".join([*_summary(counts, len(bad), len(golds)), *counts.table(config.answers_path)]), flush=True)


def _answers(name: str, flags: DataConfig, counts: Counts, bad: list[BadRow]) -> Iterator[Answer]:
    """The rows that can be read; the others go to ``bad``, and the first ends it unless they are skipped."""
    from pipa_openrlhf.data.sources import as_row, open_sources

    reading = Reading("alphamath", flags)
    [source] = open_sources(name, "train", sys.maxsize, streaming=True)
    for index, (where, text) in enumerate(source.rows()):
        counts.rows += 1
        try:
            row = as_row(where, text)
            [record] = reading.records(row, where, index)
            yield Answer(row, record, read_q_values(read_path(row, where), where))
        except UserError as error:
            bad.append((where, str(error)))
            if flags.on_error == "fail":
                raise


def read_golds(paths: Sequence[str]) -> dict[str, str]:
    """Gold answer by question, spaces and line ends made alike.

    Raises:
        UserError: a file cannot be read as problems.
    """
    from pipa_openrlhf.generate.problems import read_problems

    golds: dict[str, str] = {}
    for path in paths:
        try:
            problems = read_problems(path, split="train")
        except UserError as error:  # which names the flag of evaluation
            raise UserError(str(error).replace("--problems.file", "--regrade")) from error
        for problem in problems:
            golds.setdefault(_key(problem.question), problem.answer)
    return golds


def _key(question: str) -> str:
    return " ".join(question.split())


def _without_wrong_formats(
    answers: list[Answer], golds: dict[str, str], grader: "Grader", counts: Counts
) -> list[Answer]:
    """The answers but those that are labelled wrong although their result is the gold answer.

    The result is what the last step commits to: a box or mark in what an interpreter wrote is not the model's.
    """
    from pipa_openrlhf.evaluate.grading import extract_answer

    graded = [one for one in answers if _key(one.record.problem_id) in golds]
    results = [extract_answer(TOOL_OUTPUT.sub("", one.record.steps[-1])) for one in graded]
    found = grader.same([(result, golds[_key(one.record.problem_id)]) for result, one in zip(results, graded)])
    left_out = {id(one) for one, is_right in zip(graded, found) if is_right and not one.record.answer_label}
    counts.graded += len(graded)
    counts.wrong_format += len(left_out)
    counts.not_confirmed += sum(bool(one.record.answer_label) and not ok for one, ok in zip(graded, found))
    return [one for one in answers if id(one) not in left_out]


def _summary(counts: Counts, num_bad: int, num_golds: int) -> list[str]:
    kept = counts.right + counts.wrong
    lines = [f"{counts.rows} rows read, {num_bad} left out that cannot be read, {kept} answers to {counts.problems}"]
    lines[0] += " problems kept"
    if num_golds:
        lines.append(
            f"regraded {counts.graded} answers against {num_golds} gold answers: {counts.wrong_format} labelled wrong "
            f"with a right result left out; {counts.not_confirmed} labelled right with another result or none, kept"
        )
    return lines


def cli() -> int:
    """Console entry point."""
    return run(main, "prepare_alphamath")


if __name__ == "__main__":
    sys.exit(cli())
