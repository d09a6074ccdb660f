"""Label the steps of a worked answer by rule, against the steps of a right one."""

import os
import re

from pipa_openrlhf.annotate.equations import equation_value


def label_steps(steps: list[str], gold_steps: list[str], answer_is_right: bool) -> list[bool]:
    """One label a step; the last step's is the answer's.

    All steps of a right answer are right. In a wrong answer a step is right while its equation holds, its value is
    the gold step's value at that position, and every step before it was right; the last step is wrong.
    """
    if answer_is_right:
        return [True] * len(steps)
    labels = []
    for step, gold_step in zip(steps[:-1], gold_steps):
        value = equation_value(step)
        if value is None or value != equation_value(gold_step):
            break
        labels.append(True)
    return labels + [False] * (len(steps) - len(labels))


def is_right_throughout(steps: list[str], gold_steps: list[str]) -> bool:
    """Whether every step but the last has a true equation with the gold step's value at its position.

    A right result says less: two mistakes may make up for each other.
    """
    return all(label_steps(steps, gold_steps, answer_is_right=False)[:-1])


def split_words(text: str) -> list[str]:
    """Words of an answer with the blanks before them, a line's end with its last word; joined they are the answer."""
    return re.findall(r"\s*?\S+(?:[^\S\n]*\n)*(?:\s+\Z)?", text) or [text]


def label_words(words: list[str], gold_steps: list[str], answer_is_right: bool) -> list[bool | None]:
    """One label a word: what stands before a mistake is right, the mistake is wrong, what follows has no label.

    All words of a right answer are right. In a wrong one the mistake is the first word that is not the worked
    answer's; sums and products may be told either way round. An answer that only stops early is wrong at its last
    word, one that goes on where it should end at the first word too many.
    """
    if answer_is_right:
        return [True] * len(words)
    right = _common_words([word.strip() for word in words], gold_steps)
    right = min(right, len(words) - 1)
    return [True] * right + [False] + [None] * (len(words) - right - 1)


def _swapped(words: list[str]) -> list[str]:
    """``a + b = c`` as ``b + a = c``, a product likewise; anything else as it is."""
    if len(words) == 5 and words[1] in "+*":
        return [words[2], words[1], words[0], *words[3:]]
    return words


def _common_words(words: list[str], gold_steps: list[str]) -> int:
    """How many of the first ``words`` are those of the worked steps, each of them one way round or the other."""
    start = 0
    for step in gold_steps:
        told = step.split()
        matching = max(len(os.path.commonprefix([words[start:], way])) for way in (told, _swapped(told)))
        start += matching
        if matching < len(told):
            break
    return start
