"""Results of an evaluation: one row an answer, and their summary."""

import json
import os

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.scores import bootstrap_interval, scores_of, wilson_interval

RESULTS_FILE = "results.jsonl"
SUMMARY_FILE = "summary.json"
BREAKDOWNS = ("level", "type")


def summarise(rows: list[dict], description: dict) -> dict:
    """What was evaluated how, and its scores.

    ``accuracy`` is over answers. Its ``interval_95`` is Wilson's where each problem has one answer; answers to one
    problem depend on each other, so with several it is a bootstrap over problems, as those of ``scores`` always are.
    """
    n = len({row["problem_id"] for row in rows})
    right = sum(row["right"] for row in rows)
    scores = [_score(name, values) for name, values in scores_of(rows).items()]
    for column in BREAKDOWNS:
        scores += _breakdown(rows, column)
    return {
        "accuracy": right / len(rows),
        "interval_95": list(wilson_interval(right, n)) if n == len(rows) else scores[0]["interval_95"],
        "right": right,
        "n": n,
        "answers": len(rows),
        "no_answer": sum(row["predicted"] is None for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
        "scores": scores,
        **description,
    }


def _score(name: str, values: list[float], **group: str) -> dict:
    interval = list(bootstrap_interval(values))
    return {"score": name, **group, "n": len(values), "value": sum(values) / len(values), "interval_95": interval}


def _breakdown(rows: list[dict], column: str) -> list[dict]:
    """The scores of each value of a column, where the problems have it."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if column in row:
            groups.setdefault(row[column], []).append(row)
    return [
        _score(name, values, **{column: group})
        for group, of_group in sorted(groups.items())
        for name, values in scores_of(of_group).items()
    ]


def headline(summary: dict) -> dict:
    """The score by which evaluations are compared: accuracy, or with several answers the majority vote's."""
    n = summary.get("answers", summary["n"]) // summary["n"]
    if n == 1:
        return {"score": "accuracy", "value": summary["accuracy"], "interval_95": summary["interval_95"]}
    return next(score for score in summary["scores"] if score["score"] == f"maj@{n}")


def one_line(summary: dict) -> str:
    low, high = summary["interval_95"]
    answers = f"{summary['right']} of {summary['answers']}"
    if summary["answers"] != summary["n"]:
        answers += f" answers to {summary['n']} problems"
    text = (
        f"accuracy {summary['accuracy']:.1%} ({answers}), "
        f"95 % interval {low:.1%} to {high:.1%}; {summary['no_answer']} without an answer"
    )
    return f"{text}; graded by {summary['grader']}" if "grader" in summary else text


def score_table(summary: dict) -> str | None:
    """A line a score and group; None where there is accuracy alone, which ``one_line`` tells."""
    scores = summary["scores"]
    if len(scores) == 1:
        return None
    rows: list[tuple[str, ...]] = [("problems", "score", "n", "value", "95 % interval (bootstrap)")]
    for score in scores:
        low, high = score["interval_95"]
        group = next((f"{column} {score[column]}" for column in BREAKDOWNS if column in score), "all")
        interval = f"{low:.1%} to {high:.1%}"
        rows.append(
            (group.replace("level Level", "level"), score["score"], str(score["n"]), f"{score['value']:.1%}", interval)
        )
    return f"{text_table(rows)}\n\nGraded by {summary['grader']}."


def text_table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_summary(folder: str, summary: dict) -> None:
    """Written in one go: the file is there only once the evaluation is complete."""
    path = os.path.join(folder, SUMMARY_FILE)
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.unfinished", path)


def read_summary(folder: str) -> dict:
    """Summary of a finished evaluation.

    Raises:
        UserError: the folder holds none.
    """
    path = os.path.join(folder, SUMMARY_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no summary of a finished evaluation there; run pipa_openrlhf.cli.evaluate"
        ) from error


def read_results(folder: str) -> list[dict]:
    """Rows of an evaluation.

    Raises:
        UserError: the folder holds none.
    """
    path = os.path.join(folder, RESULTS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the results of an evaluation ({error})") from error
