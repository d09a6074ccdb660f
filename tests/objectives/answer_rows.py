"""Random answers for the tests of answer-level losses, as plain rows and as the tensors a loss takes."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from pipa_openrlhf.objectives.objective import Answers

# Per token (r_t, label, step); r_t is a multiple of 1/8 so that float32 and float64 hold the same number.
Token = tuple[float, int, int]


@dataclass(frozen=True)
class Row:
    """One answer: its tokens and whether it is right."""

    tokens: list[Token]
    answer_label: int

    def total(self) -> float:
        return sum(r for r, _, _ in self.tokens)


def as_answers(rows: list[Row], z0: float = 0.0, dtype: torch.dtype = torch.float64) -> Answers:
    """Padded tensors of ``rows``, whose ``log_ratio`` is a leaf with gradient."""
    width = max(len(row.tokens) for row in rows)

    def padded(column: int, value) -> list[list]:
        return [[token[column] for token in row.tokens] + [value] * (width - len(row.tokens)) for row in rows]

    return Answers(
        log_ratio=torch.tensor(padded(0, 0.0), dtype=dtype, requires_grad=True),
        labels=torch.tensor(padded(1, 0)),
        mask=torch.tensor([[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in rows]),
        step_ids=torch.tensor(padded(2, 0)),
        answer_label=torch.tensor([row.answer_label for row in rows]),
        z0=torch.tensor(z0, dtype=dtype),
    )


def gradient(answers: Answers, losses: torch.Tensor) -> list[list[float]]:
    """Derivative of the summed losses by every r_t inside the mask, one list a row."""
    by_token = torch.autograd.grad(losses.sum(), answers.log_ratio)[0]
    return [row[mask != 0].tolist() for row, mask in zip(by_token, answers.mask)]


def answer_rows(answer_label: int | None = None, mixed_steps: bool = True) -> st.SearchStrategy[Row]:
    """Rows of one to three steps; a right answer has right steps only, a wrong one ends in a wrong step.

    Args:
        answer_label: unset: either.
        mixed_steps: a wrong answer may have right steps before its last one.
    """

    @st.composite
    def rows(draw) -> Row:
        right = draw(st.integers(0, 1)) if answer_label is None else answer_label
        steps = draw(st.lists(st.lists(st.integers(-32, 32), min_size=1, max_size=3), min_size=1, max_size=3))
        labels = [draw(st.integers(0, 1)) if mixed_steps and not right else right for _ in steps]
        labels[-1] = right
        tokens = [(r / 8, labels[step], step) for step, values in enumerate(steps) for r in values]
        return Row(tokens, right)

    return rows()


def pair_rows(mixed_steps: bool = True) -> st.SearchStrategy[list[Row]]:
    """Chosen, rejected, chosen, rejected, ..."""
    pair = st.tuples(answer_rows(1), answer_rows(0, mixed_steps))
    return st.lists(pair, min_size=1, max_size=3).map(lambda pairs: [row for one in pairs for row in one])
