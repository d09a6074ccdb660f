"""What a run leaves in its folder about itself: ``metrics.jsonl``, a row a step, and ``args.json``, its flags."""

import json
import os

from pipa_openrlhf.errors import UserError


def read_metrics(folder: str) -> list[dict]:
    """Rows of a run's ``metrics.jsonl``; a torn last line, of a run still going, is left out.

    Raises:
        UserError: the folder has none.
    """
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no metrics of a training run there ({error})") from error


def read_args(folder: str) -> dict | None:
    """``args.json`` of the last run in ``folder``; None where there is none, or only half of one."""
    try:
        with open(os.path.join(folder, "args.json")) as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
