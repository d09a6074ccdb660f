"""Label the steps of a worked answer by rule, against the steps of a right one."""

from pipa_openrlhf.evaluation.equations import equation_value


def split_steps(text: str) -> list[str]:
    """Lines of an answer; joined by newlines they are the answer again.

    A blank line stays with the line before it (at the start: the one after it), so that no step is empty.
    """
    steps: list[str] = []
    for line in text.split("\n"):
        if steps and (not line or not steps[-1].strip("\n")):
            steps[-1] += "\n" + line
        else:
            steps.append(line)
    return steps


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
