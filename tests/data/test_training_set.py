"""Mismatched completions, as KTO's reference point takes them."""

import numpy as np
from samples import random_samples

from pipa_openrlhf.data.training_set import mismatched_completions


def test_a_mismatch_takes_the_next_answer_that_can_be_scored():
    """Without a prompt, nothing predicts the only token of the next answer: the one after it is taken."""
    samples = random_samples([(0, 5), (3, 1), (2, 4)], 50)
    mismatched = mismatched_completions(samples, 100)
    np.testing.assert_array_equal(mismatched[0].input_ids, samples[2].input_ids[2:])
    assert mismatched[0].mask.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(mismatched[2].input_ids[:2], samples[2].input_ids[:2])
    np.testing.assert_array_equal(mismatched[2].input_ids[2:], samples[0].input_ids)


def test_no_mismatch_within_one_problem_or_beyond_the_longest():
    samples = random_samples([(4, 2), (4, 9)], 50)
    assert mismatched_completions(samples, 10)[0] is None
    assert mismatched_completions(samples[:1], 100) == (None,)
