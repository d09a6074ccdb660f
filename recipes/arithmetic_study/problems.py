"""Chains of sums and differences with worked steps, and a teacher who forgets carries and borrows.

A problem is ``47+8-9``. Its worked answer has one operation a line, from left to right, and ends as GSM8K's do::

    47+8=55
    55-9=46
    #### 46

The teacher of the base model makes a systematic mistake: where the units of a sum carry, or those of a difference
borrow, the ten is forgotten, and the chain goes on from there. How often depends on the two digits alone: for some
pairs nearly always, for some seldom. So a model that learned from this teacher has pairs of digits that it nearly
always gets wrong, some that are a matter of chance, and many where nothing is carried and nothing goes wrong.

The split that a problem belongs to is a hash of its text: splits share no problem, whatever their sizes and seeds.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

SPLITS = ("base", "sft", "sample", "validation", "test")
LARGEST_VALUE = 99


@dataclass(frozen=True)
class Chain:
    """``first``, then signs and numbers: ``Chain(47, (("+", 8), ("-", 9)))``."""

    first: int
    rest: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """As a model reads it."""
        return str(self.first) + "".join(f"{sign}{number}" for sign, number in self.rest)

    @property
    def split(self) -> str:
        """The one split that may hold this problem."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return SPLITS[digest[0] % len(SPLITS)]


@dataclass(frozen=True)
class Teacher:
    """Writes worked answers.

    Attributes:
        flaw: how often a ten is forgotten, on average over the pairs of digits; 0 is a teacher without mistakes.
        spread: the pairs' own rates are spread evenly over ``flaw`` minus to ``flaw`` plus this.
    """

    flaw: float = 0.0
    spread: float = 0.0

    def rate(self, sign: str, units: tuple[int, int]) -> float:
        """How often the ten of this pair of digits is forgotten."""
        return self.flaw + self.spread * (2 * _fraction(sign, units) - 1)

    def steps(self, chain: Chain, rng: random.Random) -> list[str]:
        """Lines of a worked answer, the final one included."""
        value, steps = chain.first, []
        for sign, number in chain.rest:
            result = value + number if sign == "+" else value - number
            if moves_ten(sign, value, number) and rng.random() < self.rate(sign, (value % 10, number % 10)):
                result += -10 if sign == "+" else 10
            steps.append(f"{value}{sign}{number}={result}")
            value = result
        return [*steps, f"#### {value}"]


def moves_ten(sign: str, left: int, right: int) -> bool:
    """Whether the units carry or borrow."""
    return left % 10 + right % 10 >= 10 if sign == "+" else left % 10 < right % 10


@cache
def _fraction(sign: str, units: tuple[int, int]) -> float:
    """From 0 to 1, evenly, fixed for each pair."""
    digest = hashlib.sha256(f"{sign}{units}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def generate_chains(split: str, seed: int, least: int = 2, most: int = 4) -> Iterator[Chain]:
    """Endless distinct problems of one split with ``least`` to ``most`` operations; the same for the same arguments.

    Every value on the way is between 10 and ``LARGEST_VALUE``.
    """
    rng = random.Random(f"{split}:{seed}")
    seen = set()
    while True:
        chain = _draw(rng, rng.randint(least, most))
        if chain.split == split and chain.question not in seen:
            seen.add(chain.question)
            yield chain


def _draw(rng: random.Random, operations: int) -> Chain:
    value = first = rng.randint(10, 99)
    rest: list[tuple[str, int]] = []
    while len(rest) < operations:
        sign, number = rng.choice("+-"), rng.randint(1, 9)
        result = value + number if sign == "+" else value - number
        if 10 <= result <= LARGEST_VALUE:
            rest.append((sign, number))
            value = result
    return Chain(first, tuple(rest))
