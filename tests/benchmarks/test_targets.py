"""Verdicts on targets, from measured numbers alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

from targets import TARGETS, Ratio, verdicts  # noqa: E402

EVERYTHING = {(one.data, one.arm, one.first): Ratio(one.least, one.least, 0.0, 99.0) for one in TARGETS}
LEAST = {"words": 1.02, "trees": 1.0}


def last_words(ratios, of_least):
    return [line.split()[-1] for line in verdicts(ratios, of_least)]


def test_every_target_has_a_line_and_a_figure_that_just_reaches_it_is_ok():
    assert last_words(EVERYTHING, LEAST) == ["ok"] * (len(TARGETS) + 2)


def test_flops_and_time_must_both_reach_a_target():
    place, target = 3, TARGETS[3]
    key = (target.data, target.arm, target.first)
    for short in (Ratio(target.least - 0.01, 99.0, 99.0, 99.0), Ratio(99.0, target.least - 0.01, 0.0, 99.0)):
        words = last_words({**EVERYTHING, key: short}, LEAST)
        assert words.pop(place) == "MISSED" and set(words) == {"ok"}


def test_more_than_the_least_flops_allow_is_missed():
    assert last_words(EVERYTHING, {"words": 1.021, "trees": 1.0})[-2:] == ["MISSED", "ok"]


def test_what_was_not_measured_is_missed_and_says_so():
    lines = verdicts({}, {})
    assert len(lines) == len(TARGETS) + 2
    assert all("not measured" in line and line.endswith(" MISSED") for line in lines)


def test_the_first_pass_is_another_target_than_a_later_one():
    later = {key: ratio for key, ratio in EVERYTHING.items() if not key[2]}
    missed = [line for line in verdicts(later, LEAST) if line.endswith("MISSED")]
    assert len(missed) == 4 and all("first pass" in line for line in missed)
