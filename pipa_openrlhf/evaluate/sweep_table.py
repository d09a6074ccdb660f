"""The results of a sweep: a row a trial, the best of them, and both as a table."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipa_openrlhf.evaluate.results import headline, read_summary

RESULTS = "results.jsonl"
TABLE = "results.md"


@dataclass(frozen=True)
class TrialRow:
    """What became of a trial.

    Attributes:
        trial: number, from 1.
        point: axis of the grid to value.
        state: waiting, finished or failed.
        why: it failed.
        identity: digest of what decides its training, with the data; None: not known yet.
        folder: gets the log, the model and the evaluation.
        score: by which trials are compared: accuracy, or with several answers a problem the majority vote's.
        value: of the score on the held-out problems.
        interval_95: of the value.
        problems: held-out ones.
    """

    trial: int
    point: dict[str, str]
    state: str = "waiting"
    why: str | None = None
    identity: str | None = None
    folder: str | None = None
    score: str | None = None
    value: float | None = None
    interval_95: Sequence[float] | None = None
    problems: int | None = None

    @property
    def name(self) -> str:
        """Its point in the grid."""
        return "; ".join(f"{axis} {value}" for axis, value in self.point.items())

    def failed(self, why: str) -> "TrialRow":
        """The row of a trial that did not come to its end."""
        return replace(self, state="failed", why=why)

    def finished(self, evaluation: str) -> "TrialRow":
        """The row with the results of an evaluation's folder.

        Raises:
            UserError: there are none.
        """
        summary = read_summary(evaluation)
        score = headline(summary)
        values = {name: score[name] for name in ("score", "value", "interval_95")}
        return replace(self, state="finished", problems=summary["n"], **values)


def best(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The finished trial of the highest value, of equal ones the first; None: none has finished."""
    return max((row for row in rows if row.value is not None), key=lambda row: row.value or 0.0, default=None)


def markdown(rows: Sequence[TrialRow]) -> str:
    """The page: the best trial, and all of them, those of higher value first."""
    winner = best(rows)
    line = "No trial has finished."
    if winner is not None:
        line = f"Best: trial {winner.trial} ({winner.name}), {_score(winner)}, in `{winner.folder}`."
    order = sorted(rows, key=lambda row: (row.state == "failed", 1.0 if row.value is None else -row.value, row.trial))
    axes = list(rows[0].point)
    cells = [["trial", *axes, "result"], ["---"] * (len(axes) + 2)]
    cells += [[str(row.trial), *row.point.values(), _result(row)] for row in order]
    return f"{line}\n\n" + "".join(f"| {' | '.join(map(_cell, some))} |\n" for some in cells)


def write(folder: str, rows: Sequence[TrialRow]) -> None:
    """Both files, each whole at every moment."""
    texts = {RESULTS: "".join(json.dumps(asdict(row)) + "\n" for row in rows), TABLE: markdown(rows)}
    for name, text in texts.items():
        path = os.path.join(folder, name)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.new", path)


def _score(row: TrialRow) -> str:
    low, high = row.interval_95 or (0.0, 0.0)
    return f"{row.score} {row.value:.1%} ({low:.1%} to {high:.1%}) of {row.problems} problems"


def _result(row: TrialRow) -> str:
    if row.state == "finished":
        return _score(row)
    return f"failed: {row.why}" if row.state == "failed" else row.state


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
