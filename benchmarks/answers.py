"""The answers that training is measured on: what ``sample_answers.sh`` sampled, and paths of its search trees.

Their tokens are SmolLM2's, numbered anew in the order in which they come, because a random model needs no vocabulary
of which most is not used.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inputs import CHARACTERS, Problem
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PER_PROBLEM = 8


@dataclass(frozen=True)
class Data:
    """Answers of one kind.

    Attributes:
        what: a line about them.
        batch_size: sequences of an optimizer step.
    """

    name: str
    what: str
    problems: list[Problem]
    batch_size: int


class Numbering:
    """Numbers tokens anew, from 0, in the order in which they come."""

    def __init__(self):
        self._numbers: dict[int, int] = {}

    def __call__(self, tokens: Iterable[int]) -> list[int]:
        """The tokens' numbers.

        Raises:
            SystemExit: there are more different ones than the models' vocabulary holds.
        """
        numbered = [self._numbers.setdefault(token, len(self._numbers)) for token in tokens]
        if len(self._numbers) > CHARACTERS:
            raise SystemExit(f"the answers have more than {CHARACTERS} different tokens: use fewer of them")
        return numbered


def read_answers(folder: Path) -> dict[str, Data]:
    """All kinds that are in the output folder of ``sample_answers.sh``: words, trees, and GSM8K where it was given.

    Raises:
        SystemExit: nothing was sampled yet.
    """
    if not (folder / "words.jsonl").exists() or not (folder / "trees.jsonl").exists():
        command = f"bash benchmarks/sample_answers.sh --output {folder}"
        raise SystemExit(f"{folder}: no sampled answers there; `{command}` makes them in some minutes")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    numbering = Numbering()
    words = _sampled(folder / "words.jsonl", tokenizer, numbering, chat=False)
    trees = tree_paths(_rows(folder / "trees.jsonl"), tokenizer, numbering)
    found = [
        Data("words", "word problems, eight sampled answers each", words[: len(words) // 4 * 4], 32),
        Data("trees", "eight paths of one search tree a problem", trees[:4], 16),
    ]
    if (folder / "gsm8k.jsonl").exists():
        gsm8k = _sampled(folder / "gsm8k.jsonl", tokenizer, numbering, chat=True)
        found.append(Data("gsm8k", "GSM8K questions, eight sampled answers each", gsm8k[:2], 16))
    return {data.name: data for data in found}


def _sampled(path: Path, tokenizer: PreTrainedTokenizerBase, numbering: Numbering, chat: bool) -> list[Problem]:
    """Problems to which eight answers were sampled, none of them empty, the right ones first."""
    by_prompt: dict[str, list[dict]] = {}
    for row in _rows(path):
        by_prompt.setdefault(row["prompt"], []).append(row)
    problems = []
    for question, rows in by_prompt.items():
        if chat:
            turn = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        else:
            text = question + "\n"
        answers = [row["completion"] for row in sorted(rows, key=lambda row: not row["label"])]
        if len(answers) == PER_PROBLEM and tokenizer.eos_token not in answers:
            problems.append(_problem(text, answers, tokenizer, numbering))
    return problems


def tree_paths(rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase, numbering: Numbering) -> list[Problem]:
    """Problems of AlphaMath's rows, which are paths, eight of a question."""
    by_question: dict[str, list[str]] = {}
    for row in rows:
        path = "\n".join(step["step"] for step in row["output"])
        by_question.setdefault(row["instruction"] + "\n", []).append(path)
    return [_problem(question, paths, tokenizer, numbering) for question, paths in by_question.items()]


def tokens_left(problems: list[Problem]) -> tuple[int, int, int]:
    """Tokens of all sequences; with a problem's prompt counted once; with every common prefix counted once."""
    every = sum(len(ids) for one in problems for ids in one.sequences())
    repeated_prompts = sum(len(one.prompt) * (len(one.completions) - 1) for one in problems)
    distinct = {tuple(ids[: end + 1]) for one in problems for ids in one.sequences() for end in range(len(ids))}
    return every, every - repeated_prompts, len(distinct)


def _problem(prompt: str, answers: list[str], tokenizer: PreTrainedTokenizerBase, numbering: Numbering) -> Problem:
    def tokens(text: str) -> list[int]:
        return numbering(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Problem(tokens(prompt), [tokens(answer) for answer in answers])


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
