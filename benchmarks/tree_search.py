"""Paths of search trees in AlphaMath's layout: eight leaves of one tree a problem, up to four of them right.

    python -m benchmarks.tree_search --model FOLDER --problems FILE --output FILE [--most NUMBER]

A step is a line that the model samples. The search has the settings that AlphaMath publishes (Super_MARIO,
configs/mcts_sft_round.yaml): 40 iterations, each of which samples 5 continuations of one place at temperature 1 and
keeps those that differ, at most 8 steps, places chosen by PUCT. There is no value model: leaves alone say what a place
is worth, and a step's prior is its share of the five. Equations become the code and the output that such a step has.
"""

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipa_openrlhf.annotate.equations import equation_value
from pipa_openrlhf.evaluate.grading import extract_answer, parse_number
from pipa_openrlhf.generate.problems import Problem, read_problems
from pipa_openrlhf.generate.sampling import SamplingSettings, plan_batches, sample_batches

ITERATIONS, CHILDREN, MOST_STEPS, EXPLORATION = 40, 5, 8, 1.5
PATHS = 8  # of a tree, at most half of them right


@dataclass(eq=False)
class Place:
    """A step in a search tree.

    Attributes:
        line: what the step says; the root's is empty.
        visits, total: how many values came back through here, and their sum.
        is_right: of a leaf, whether its answer is.
        is_spent: nothing can grow from here.
    """

    line: str = ""
    parent: "Place | None" = None
    prior: float = 1.0
    children: list["Place"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    is_right: bool | None = None
    is_spent: bool = False

    @property
    def value(self) -> float:
        """Mean of the leaves found from here, in [-1, 1]."""
        return self.total / self.visits if self.visits else 0.0

    @property
    def path(self) -> list["Place"]:
        """The steps from the first one to this one."""
        return [] if self.parent is None else [*self.parent.path, self]

    def puct(self) -> float:
        """What the search goes by; not of the root."""
        assert self.parent is not None
        return self.value + EXPLORATION * self.prior * math.sqrt(self.parent.visits) / (1 + self.visits)

    def come_back(self, value: float) -> None:
        """Tell this place and all before it."""
        self.visits, self.total = self.visits + 1, self.total + value
        if self.parent is not None:
            self.parent.come_back(value)

    def leaves(self) -> Iterator["Place"]:
        """Those with an answer, in the order of the tree."""
        if self.is_right is not None:
            yield self
        for child in self.children:
            yield from child.leaves()


def select(root: Place) -> Place | None:
    """The place to grow; None: the search ran into one from which everything is known."""
    place = root
    while place.children:
        living = [child for child in place.children if not child.is_spent]
        if not living:
            place.is_spent = True
            return None
        place = max(living, key=Place.puct)
    return None if place.is_spent else place


def grow(place: Place, lines: list[str], answer: str) -> None:
    """Give ``place`` the ``lines`` that differ as its children, and tell the tree what the leaves among them are."""
    for line, count in Counter(lines).items():
        child = Place(line, place, count / len(lines))
        place.children.append(child)
        is_answer = "####" in line
        if is_answer or not line.strip() or len(child.path) >= MOST_STEPS:
            given = extract_answer(line) if is_answer else None
            child.is_right = given is not None and parse_number(given) == parse_number(answer)
            child.is_spent = True
            child.come_back(1.0 if child.is_right else -1.0)
    place.come_back(0.0)


def as_step(line: str) -> str:
    """A sampled line as AlphaMath writes a step."""
    if "####" in line:
        return f"<step>\n<p>\nFinal Answer: ${line.split('####', 1)[1].strip()}$\n</p>\n</step>"
    left = line.rpartition("=")[0].strip()
    value = equation_value(f"{left} = {left}") if left else None
    if value is None:
        return f"<step>\n<p>\n{line}\n</p>\n</step>"
    code = f"<code>\n```python\nprint({left})\n```\n</code>\n<output>\n{value}\n</output>"
    return f"<step>\n<p>\n{line}\n</p>\n{code}\n</step>"


def rows_of(root: Place, question: str, rng: random.Random) -> list[dict]:
    """Rows of AlphaMath's layout: ``PATHS`` leaves drawn at random, the right ones first; none of a smaller tree.

    As many wrong ones as right ones, where there are; a small model finds few right ones in a hard problem.
    """
    leaves = list(root.leaves())
    right, wrong = ([leaf for leaf in leaves if leaf.is_right is label] for label in (True, False))
    right = rng.sample(right, min(len(right), max(PATHS // 2, PATHS - len(wrong))))
    wrong = rng.sample(wrong, min(len(wrong), PATHS - len(right)))
    if len(right) + len(wrong) < PATHS:
        return []
    rows = []
    for leaf in right + wrong:
        steps = [{"step": as_step(one.line), "P": one.prior, "Q": one.value} for one in leaf.path]
        rows.append({"instruction": f"<question> {question} </question>", "output": steps})
    return rows


def search(problems: list[Problem], model, tokenizer) -> list[Place]:
    """The trees of ``problems``, all grown side by side."""
    roots = [Place() for _ in problems]
    for iteration in range(ITERATIONS):
        growing = [(place, one) for root, one in zip(roots, problems) if (place := select(root)) is not None]
        prompts = ["\n".join([one.question, *(step.line for step in place.path), ""]) for place, one in growing]
        sampling = SamplingSettings(CHILDREN, temperature=1.0, max_new_tokens=24, seed=iteration, stop="\n")
        for batch, answers in sample_batches(model, tokenizer, prompts, plan_batches(prompts, sampling), sampling):
            for index, sampled in zip(batch, answers):
                place, problem = growing[index]
                grow(place, [answer.text for answer in sampled], problem.answer)
    return roots


def main() -> None:
    """Search, and write the paths of trees that have enough of them."""
    from pipa_openrlhf.distributed.strategy import dtype_of, fastest_dtype
    from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "problems", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--most", type=int, default=None, help="problems, from the top of the file")
    options = parser.parse_args()
    problems = read_problems(options.problems, options.most)
    model = load_causal_lm(options.model, dtype_of(fastest_dtype()), "sdpa")
    roots = search(problems, model, load_tokenizer(options.model, padding_side="left"))
    rng = random.Random(0)
    of_problems = [rows_of(root, one.question, rng) for root, one in zip(roots, problems)]
    whole = [rows for rows in of_problems if rows]
    Path(options.output).write_text("".join(json.dumps(row) + "\n" for rows in whole for row in rows))
    print(f"{len(whole)} of {len(problems)} trees have {PATHS} paths: {options.output}")


if __name__ == "__main__":
    main()
