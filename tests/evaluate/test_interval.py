"""Wilson intervals against values worked out by hand from the closed form."""

import pytest

from pipa_openrlhf.evaluate.results import wilson_interval


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # centre 0.5, half z / (1 + z^2/n) * sqrt(0.25/n + z^2/(4 n^2)) = 1.96 / 1.038415 * 0.050952
        (50, 100, 0.40383, 0.59617),
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, as the next row
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
