"""Step-DPO and Step-KTO on a hand-worked example, and where they equal their answer-level loss."""

import math

import pytest
from answer_rows import Row, answer_rows, as_answers, gradient, pair_rows
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.objectives.dpo import dpo, step_dpo
from pipa_openrlhf.objectives.kto import kto, step_kto

TABLE = {
    "dpo": dpo(0.5),
    "kto": kto(0.5),
    **{f"step_dpo_{name}": step_dpo(name, 0.5) for name in ("l0", "l1")},
    **{f"step_kto_{name}": step_kto(name, 0.5) for name in ("l1", "per_step")},
}

# R+ = 2. The rejected answer: a right step with r = 3 - 1, then a wrong one with r = 1, so R- = 3.
CHOSEN = Row([(0.5, 1, 0), (1.5, 1, 1)], 1)
REJECTED = Row([(3.0, 1, 0), (-1.0, 1, 0), (1.0, 0, 1)], 0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def value_and_gradient(key: str, rows: list[Row], z0: float = 0.0):
    answers = as_answers(rows, z0)
    losses = TABLE[key].answer_loss(answers)
    return losses.tolist(), gradient(answers, losses)


def test_step_dpo_l1_keeps_the_value_of_dpo_and_stops_the_gradient_of_right_steps():
    losses, gradients = value_and_gradient("step_dpo_l1", [CHOSEN, REJECTED])
    # 0.5 (2 - 3) = -0.5; the gradient of -log sigmoid(x) is -sigmoid(-x).
    assert losses == pytest.approx([math.log(1 + math.exp(0.5))])
    slope = 0.5 * sigmoid(0.5)
    assert gradients[0] == pytest.approx([-slope, -slope])
    assert gradients[1] == pytest.approx([0, 0, slope])


def test_step_dpo_l0_leaves_right_steps_of_the_rejected_answer_out():
    losses, gradients = value_and_gradient("step_dpo_l0", [CHOSEN, REJECTED])
    # 0.5 (2 - 1) = 0.5.
    assert losses == pytest.approx([math.log(1 + math.exp(-0.5))])
    slope = 0.5 * sigmoid(-0.5)
    assert gradients[0] == pytest.approx([-slope, -slope])
    assert gradients[1] == pytest.approx([0, 0, slope])


def test_l1_kto_keeps_the_value_of_kto_and_stops_the_gradient_of_right_steps_of_wrong_answers():
    losses, gradients = value_and_gradient("step_kto_l1", [CHOSEN, REJECTED], z0=1.0)
    # Right: 1 - sigmoid(0.5 (2 - 1)). Wrong: 1 - sigmoid(0.5 (1 - 3)).
    assert losses == pytest.approx([sigmoid(-0.5), sigmoid(1.0)])
    right, wrong = 0.5 * sigmoid(0.5) * sigmoid(-0.5), 0.5 * sigmoid(1.0) * sigmoid(-1.0)
    assert gradients[0] == pytest.approx([-right, -right])
    assert gradients[1] == pytest.approx([0, 0, wrong])


def test_step_kto_has_one_term_a_step_each_with_the_steps_own_label():
    losses, gradients = value_and_gradient("step_kto_per_step", [CHOSEN, REJECTED], z0=1.0)
    # Right answer, steps with r = 0.5 and 1.5; wrong answer, a right step with r = 2 and a wrong one with r = 1.
    first, second = sigmoid(-0.5 * (0.5 - 1)), sigmoid(-0.5 * (1.5 - 1))
    third, fourth = sigmoid(-0.5 * (2 - 1)), sigmoid(0.5 * (1 - 1))
    assert losses == pytest.approx([first + second, third + fourth])

    def slope(term: float) -> float:
        return 0.5 * term * (1 - term)

    assert gradients[0] == pytest.approx([-slope(first), -slope(second)])
    assert gradients[1] == pytest.approx([-slope(third), -slope(third), slope(fourth)])


def test_step_kto_gives_no_term_to_a_step_that_is_wholly_masked():
    answers = as_answers([REJECTED], z0=1.0)
    whole = TABLE["step_kto_per_step"].answer_loss(answers).item()
    answers.mask[0, 2] = 0  # the wrong step; the trainer zeroes its log-ratio as well
    answers.log_ratio.data[0, 2] = 0.0
    assert TABLE["step_kto_per_step"].answer_loss(answers).item() == pytest.approx(whole - sigmoid(0.5 * (1 - 1)))


def test_step_kto_weights_follow_the_step_not_the_answer():
    losses = step_kto("per_step", 0.5, 2.0, 0.0).answer_loss(as_answers([REJECTED], z0=1.0))
    assert losses.tolist() == pytest.approx([2 * sigmoid(-0.5 * (2 - 1))])


def test_steps_without_a_token_have_no_term_and_do_not_shift_the_others():
    """A tokenizer may give a step's text no token: then a step's number may be beyond the answer's tokens."""
    sparse = [
        Row([(r, label, {0: 1, 1: 9}[step]) for r, label, step in row.tokens], row.answer_label)
        for row in (CHOSEN, REJECTED)
    ]
    for key in ("step_kto_per_step", "step_kto_l1", "step_dpo_l1", "step_dpo_l0"):
        assert_same(value_and_gradient(key, sparse, z0=1.0), value_and_gradient(key, [CHOSEN, REJECTED], z0=1.0))


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for got, expected in zip(one[1], other[1]):
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("key", ["step_dpo_l0", "step_dpo_l1"])
@given(rows=pair_rows(mixed_steps=False))
def test_step_dpo_is_dpo_where_all_steps_of_rejected_answers_are_wrong(key, rows):
    assert_same(value_and_gradient(key, rows), value_and_gradient("dpo", rows))


@given(pair_rows())
def test_step_dpo_l1_always_has_the_value_of_dpo(rows):
    assert value_and_gradient("step_dpo_l1", rows)[0] == pytest.approx(value_and_gradient("dpo", rows)[0], rel=1e-12)


@given(st.lists(answer_rows(mixed_steps=False), min_size=1, max_size=4), st.sampled_from([0.0, 1.25]))
def test_l1_kto_is_kto_where_all_steps_of_wrong_answers_are_wrong(rows, z0):
    assert_same(value_and_gradient("step_kto_l1", rows, z0), value_and_gradient("kto", rows, z0))


@given(st.lists(answer_rows(mixed_steps=False), min_size=1, max_size=4), st.sampled_from([0.0, 1.25]))
def test_step_kto_is_kto_for_answers_of_one_step(rows, z0):
    in_one_step = [Row([(r, label, 0) for r, label, _ in row.tokens], row.answer_label) for row in rows]
    assert_same(value_and_gradient("step_kto_per_step", in_one_step, z0), value_and_gradient("kto", in_one_step, z0))
