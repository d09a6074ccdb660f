"""Reductions against hand-worked sums, and their independence of how a batch is cut."""

import numpy as np
import pytest
import torch

from pipa_openrlhf.objectives.batch_loss import BatchCounts, count_batch, sft_term_weights, token_weights

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
LABELS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
LOSSES = torch.tensor([[1.0, 2.0, 99.0, 99.0], [3.0, 4.0, 5.0, 6.0], [99.0, 7.0, 99.0, 99.0]])
ANSWER_LABELS = [1, 0, 1]
TOKENS, RIGHT = MASK.sum(1).numpy(), (LABELS * MASK).sum(1).numpy()
COUNTS = count_batch(TOKENS, RIGHT, np.array(ANSWER_LABELS))


def test_counts():
    # Row 0 has one right token inside its mask, row 1 none, row 2 one.
    assert COUNTS == BatchCounts(
        units=3, sequences=3, labelled_tokens=7, sequences_with_right_tokens=2, right_answers=2
    )


@pytest.mark.parametrize(
    "reduction, expected",
    [
        ("sum", (3 + 18 + 7) / 3),
        ("token_mean", 28 / 7),
        ("sequence_mean", (3 / 2 + 18 / 4 + 7) / 3),
    ],
)
def test_reductions_by_hand(reduction, expected):
    whole = (LOSSES * token_weights(MASK, reduction, COUNTS)).sum()
    assert whole.item() == pytest.approx(expected)
    by_row = sum((LOSSES[[row]] * token_weights(MASK[[row]], reduction, COUNTS)).sum() for row in range(3))
    assert by_row.item() == pytest.approx(expected)


def test_sft_term_by_hand():
    # Row 0: mean over its one right token, 1; row 2: 7; row 1 has no right token and does not count.
    assert (LOSSES * sft_term_weights(LABELS, MASK, COUNTS)).sum().item() == pytest.approx((1 + 7) / 2)


def test_sft_term_without_right_tokens_is_zero():
    counts = count_batch(TOKENS[1:2], RIGHT[1:2], np.array([0]))
    assert sft_term_weights(LABELS[[1]], MASK[[1]], counts).sum().item() == 0


def test_unknown_reduction():
    with pytest.raises(ValueError):
        token_weights(MASK, "median", COUNTS)
