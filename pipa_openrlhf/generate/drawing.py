"""Draw next tokens, each by one number in [0, 1).

``torch.multinomial``, which generate() uses, draws a random number for every token of the vocabulary, which on a CPU
shows beside a small model.
"""

from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


def warpers(temperature: float, top_p: float) -> Any:
    """What makes of logits [R, V] those to draw from; ``temperature`` 0, at which nothing is drawn, leaves them."""
    chosen = LogitsProcessorList()
    if temperature not in (0, 1):
        chosen.append(TemperatureLogitsWarper(float(temperature)))
    if top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen


def draw_tokens(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[R] tokens: of each row of ``logits`` [R, V] the token in whose share of [0, 1) its number of [R] lies."""
    ends = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    numbers = numbers.to(ends)[:, None] * ends[:, -1:]
    return torch.searchsorted(ends, numbers, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class DrawToken(LogitsProcessor):
    """For generate() without ``do_sample``: of all scores only the drawn token's is left, which is the largest.

    Args:
        count: rows at the beginning.

    Attributes:
        rows: which of them are scored. What one draws does not depend on which others have left.
    """

    def __init__(self, temperature: float, top_p: float, count: int):
        self._warpers = warpers(temperature, top_p)
        self._count = count
        self.rows = list(range(count))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        numbers = torch.rand(self._count, dtype=torch.float64)[self.rows]
        tokens = draw_tokens(self._warpers(input_ids, scores.float()), numbers)
        only = torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
        return cast(torch.FloatTensor, only)
