"""Step labels by arithmetic: the first step that states an equation which does not hold is the first wrong one."""

from pipa_openrlhf.annotate.answers import NO_ERROR, SampledAnswer, Verdict
from pipa_openrlhf.annotate.equations import equations_hold


def judge_by_rule(answer: SampledAnswer) -> Verdict:
    """What arithmetic alone says: a wrong plan with right sums passes, and so does a step without an equation."""
    wrong = (index for index, step in enumerate(answer.steps) if equations_hold(step) is False)
    return Verdict(next(wrong, NO_ERROR))
