"""Drawing tokens: each number falls into the share of one token."""

import pytest
import torch

from pipa_openrlhf.generate.drawing import DrawToken, draw_tokens, warpers

SHARES = torch.tensor([0.125, 0.25, 0.625])


@pytest.mark.parametrize(
    "number, token", [(0.0, 0), (0.12, 0), (0.13, 1), (0.37, 1), (0.38, 2), (0.9999999999, 2), (1.0, 2)]
)
def test_a_number_is_in_the_share_of_one_token(number, token):
    assert draw_tokens(SHARES.log()[None] + 3.0, torch.tensor([number])).tolist() == [token]


def test_rows_are_drawn_each_by_its_own_number():
    logits = torch.stack([SHARES.log(), SHARES.flip(0).log()])
    assert draw_tokens(logits, torch.tensor([0.2, 0.2])).tolist() == [1, 0]


def test_tokens_without_chance_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = draw_tokens(logits.expand(101, -1), torch.linspace(0, 1, 101))
    assert set(drawn.tolist()[:-1]) == {1, 3}


@pytest.mark.parametrize(
    "temperature, top_p, shares",
    [(1.0, 1.0, [0.125, 0.25, 0.625]), (0.5, 1.0, [1 / 30, 4 / 30, 25 / 30]), (1.0, 0.7, [0.0, 2 / 7, 5 / 7])],
)
def test_generate_is_left_one_token_by_temperature_and_top_p(temperature, top_p, shares):
    torch.manual_seed(0)
    draw = DrawToken(temperature, top_p, count=20000)
    scores = draw(torch.zeros(20000, 1, dtype=torch.long), SHARES.log().expand(20000, -1))
    assert ((scores == 0).sum(-1) == 1).all() and ((scores == -torch.inf).sum(-1) == 2).all()
    drawn = torch.bincount(scores.argmax(-1), minlength=3) / 20000
    assert drawn.tolist() == pytest.approx(shares, abs=0.015)


def test_a_row_draws_the_same_whichever_others_have_left():
    scores, drawn = SHARES.log().expand(40, -1), []
    for rows in (list(range(40)), list(range(0, 40, 3))):
        draw = DrawToken(1.0, 1.0, count=40)
        draw.rows = rows
        torch.manual_seed(0)
        drawn.append(draw(torch.zeros(len(rows), 1, dtype=torch.long), scores[: len(rows)]).argmax(-1))
    assert torch.equal(drawn[1], drawn[0][::3])


def test_greedy_decoding_warps_nothing():
    assert torch.equal(warpers(0, 1.0)(torch.empty(0), SHARES[None]), SHARES[None])
