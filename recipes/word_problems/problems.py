"""Short arithmetic word problems with worked steps, any number of them.

A problem is an opening, some events and a question, each phrase drawn at random with its names, things and numbers.
The worked answer has one equation a step and ends in a ``#### answer`` line, as GSM8K's answers do::

    12 + 7 = 19
    19 * 3 = 57
    #### 57

The split a problem belongs to is a hash of its equations. Splits therefore share no problem, not even the same
numbers told in other words, whatever their sizes and seeds.
"""

import hashlib
import json
import math
import operator
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

SPLITS = ("train", "sample", "validation", "test")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

HE = """
Adam Ben Carl David Eli Finn George Henry Ivan Jack Kevin Leo Mark Noah Oscar Paul Ryan Sam Tom Victor Will
Zack
""".split()
SHE = """
Anna Beth Clara Diana Emma Fiona Grace Helen Ivy Julia Kate Lucy Maria Nina Olivia Paula Rosa Sara Tina Uma
Vera Wendy
""".split()
THINGS = """
apples books buttons cakes candles cards coins cookies cups dolls eggs flags flowers keys kites lamps lemons
marbles masks mugs nuts oranges pears pencils pens pins plates plums ribbons rings ropes seeds shells spoons
stamps stickers stones tickets toys trees
""".split()

# {a} and {b} are the two numbers of an equation; a phrase with {b} alone continues from the value so far.
OPENINGS = (
    "{name} has {a} {things}.",
    "{name} buys {a} {things}.",
    "{name} finds {a} {things}.",
    "{name} starts with {a} {things}.",
    "{name} collects {a} {things}.",
    "There are {a} {things} in the bag of {name}.",
)
PRODUCT_OPENINGS = (
    "{name} has {a} boxes of {b} {things}.",
    "{name} buys {a} packs of {b} {things}.",
    "{name} fills {a} bags with {b} {things} each.",
    "{name} packs {b} {things} into each of {a} crates.",
    "{name} gets {b} {things} a day for {a} days.",
)
EVENTS = (
    ("+", "Then {he} buys {b} more."),
    ("+", "{other} gives {him} {b} more."),
    ("+", "Later {he} finds {b} more."),
    ("+", "{he} wins {b} more."),
    ("-", "Then {he} gives {b} to {other}."),
    ("-", "{he} loses {b} of them."),
    ("-", "{other} takes {b} of them."),
    ("-", "Then {he} sells {b}."),
    ("*", "Soon {he} has {b} times as many."),
)
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "What is the number of {things} now?",
)
CLOSINGS = (
    ("+", "{other} has {b} more than {name}. How many {things} does {other} have?"),
    ("+", "{other} has {b}. How many {things} do they have together?"),
    ("-", "{other} has {b} fewer than {name}. How many {things} does {other} have?"),
    ("-", "{b} of them are red. How many {things} are not red?"),
    ("*", "{other} has {b} times as many. How many {things} does {other} have?"),
    ("*", "Each costs {b} dollars. How many dollars do they all cost?"),
    ("*", "Each weighs {b} grams. How many grams do they all weigh?"),
)
# The words suggest the other operation: what is asked is the number that the sentence starts from.
TURNED_CLOSINGS = (
    ("-", "That is {b} more than {other} has. How many {things} does {other} have?"),
    ("-", "{he} has {b} more than {other}. How many {things} does {other} have?"),
    ("-", "{other} needs {b} more to have as many. How many {things} does {other} have?"),
    ("-", "{he} has just added {b} to what was there. How many {things} were there before?"),
    ("+", "That is {b} fewer than {other} has. How many {things} does {other} have?"),
    ("+", "{he} has {b} fewer than {other}. How many {things} does {other} have?"),
    ("+", "{other} must give away {b} to have as many. How many {things} does {other} have?"),
    ("+", "This is what is left after {b} were lost. How many {things} were there before?"),
)


@dataclass(frozen=True)
class WordProblem:
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def completion(self) -> str:
        """The worked answer as one text."""
        return "\n".join(self.steps)

    @property
    def split(self) -> str:
        """The one split that may hold this problem."""
        digest = hashlib.sha256(self.completion.encode()).digest()
        return SPLITS[digest[0] % len(SPLITS)]


def generate_problems(
    split: str, seed: int, max_steps: int, turned: float = 0.0, largest_value: int = 20
) -> Iterator[WordProblem]:
    """Endless distinct problems of one split, of one to ``max_steps`` equations; the same for the same arguments.

    Args:
        turned: share of problems that end in one of ``TURNED_CLOSINGS``.
        largest_value: no equation has a larger result; at least 6.
    """
    rng = random.Random(f"{split}:{seed}")
    seen = set()
    while True:
        problem = _draw(rng, rng.randint(1, max_steps), rng.random() < turned, largest_value)
        if problem.split == split and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _draw(rng: random.Random, num_steps: int, is_turned: bool, largest_value: int) -> WordProblem:
    words = _draw_words(rng)
    steps, sentences = [], []
    if rng.random() < 0.35 and not (is_turned and num_steps == 1):
        factor = rng.randint(2, math.isqrt(largest_value))
        numbers = {"a": factor, "b": rng.randint(2, _largest_number("*", factor, largest_value))}
        sentences.append(rng.choice(PRODUCT_OPENINGS).format(**numbers, **words))
        value = _append_step(steps, numbers["a"], "*", numbers["b"])
    else:
        value = rng.randint(2, min(12, largest_value - 1))
        sentences.append(rng.choice(OPENINGS).format(a=value, **words))
    ask_about_now = not is_turned and (rng.random() < 0.5 if len(steps) < num_steps else True)
    while len(steps) < num_steps:
        is_last = len(steps) == num_steps - 1
        closings = TURNED_CLOSINGS if is_turned else CLOSINGS
        phrases = closings if is_last and not ask_about_now else EVENTS
        largest = {sign: _largest_number(sign, value, largest_value) for sign in OPERATIONS}
        sign, phrase = rng.choice([(sign, phrase) for sign, phrase in phrases if largest[sign] > 1])
        number = rng.randint(2, largest[sign])
        sentences.append(_capitalised(phrase.format(b=number, **words)))
        value = _append_step(steps, value, sign, number)
    if ask_about_now:
        sentences.append(rng.choice(QUESTIONS).format(**words))
    steps.append(f"#### {value}")
    return WordProblem(" ".join(sentences), tuple(steps), str(value))


def _draw_words(rng: random.Random) -> dict[str, str]:
    names, he, him = rng.choice(((HE, "he", "him"), (SHE, "she", "her")))
    name = rng.choice(names)
    other = rng.choice([person for person in HE + SHE if person != name])
    return {"name": name, "other": other, "he": he, "him": him, "things": rng.choice(THINGS)}


def _largest_number(sign: str, value: int, largest_value: int) -> int:
    """Largest second operand that keeps the result between 1 and ``largest_value``."""
    if sign == "*":
        return min(5, largest_value // value)
    return min(9, value - 1 if sign == "-" else largest_value - value)


def _append_step(steps: list[str], left: int, sign: str, right: int) -> int:
    result = OPERATIONS[sign](left, right)
    steps.append(f"{left} {sign} {right} = {result}")
    return result


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def write_rows(path: str, rows: list[dict]) -> None:
    """One row a line; the file has its name once it is whole."""
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{path}.unfinished", path)
