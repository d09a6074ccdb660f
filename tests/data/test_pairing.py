"""Matching right with wrong answers."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipa_openrlhf.data.dataset import keep_labels, match_pairs
from pipa_openrlhf.data.samples import Sample, Samples, as_samples

ANSWERS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 1)), max_size=25)


def sample(index: int, problem: str, label: int, pair_id: int | None = None) -> Sample:
    one = np.ones(1, dtype=np.int8)
    return Sample(np.array([index], dtype=np.int32), 0, one * label, one, one * 0, label, problem, pair_id, f"{index}")


def made_of(answers) -> Samples:
    return as_samples([sample(index, problem, label) for index, (problem, label) in enumerate(answers)])


@settings(max_examples=200, deadline=None)
@given(answers=ANSWERS, seed=st.integers(0, 3))
def test_every_match_is_one_right_and_one_wrong_answer_of_a_problem(answers, seed):
    samples = made_of(answers)
    paired = match_pairs(samples, seed)
    for chosen, rejected in zip(paired[::2], paired[1::2], strict=True):
        assert (chosen.answer_label, rejected.answer_label) == (1, 0)
        assert chosen.problem_id == rejected.problem_id
        assert chosen.pair_id == rejected.pair_id
    assert len({item.where for item in paired}) == len(paired)  # none used twice
    assert len({item.pair_id for item in paired}) == len(paired) // 2
    counts = Counter(answers)
    assert len(paired) == 2 * sum(min(counts[problem, 0], counts[problem, 1]) for problem in "pqr")
    assert [item.where for item in paired] == [item.where for item in match_pairs(samples, seed)]


@settings(max_examples=50, deadline=None)
@given(answers=ANSWERS)
def test_pairs_stand_in_data_order_of_their_first_member(answers):
    paired = match_pairs(made_of(answers), 0)
    firsts = [min(int(a.where), int(b.where)) for a, b in zip(paired[::2], paired[1::2], strict=True)]
    assert firsts == sorted(firsts)


def test_a_part_of_the_pairs_keeps_its_ids():
    paired = match_pairs(made_of([("p", index % 2) for index in range(6)]), 0)
    part = keep_labels(paired[2:], "all")
    assert [one.pair_id for one in part] == [one.pair_id for one in paired][2:] == part.column("pair_id").tolist()


def test_the_seed_changes_the_matches():
    samples = made_of([("p", index % 2) for index in range(20)])
    assert len({tuple(item.where for item in match_pairs(samples, seed)) for seed in range(5)}) == 5


def test_which_of_too_many_answers_are_left_over_is_random():
    for many, few in ((1, 0), (0, 1)):
        samples = made_of([("p", few), *[("p", many)] * 9])
        partners = {item.where for seed in range(20) for item in match_pairs(samples, seed) if item.where != "0"}
        assert len(partners) > 4


def test_another_problem_changes_nothing():
    answers = [("p", index % 2) for index in range(10)]
    alone = [item.where for item in match_pairs(made_of(answers), 7)]
    beside = match_pairs(made_of([*answers, ("q", 1), ("q", 0)]), 7)
    assert [item.where for item in beside if item.problem_id == "p"] == alone


def test_given_pairs_are_never_rematched():
    samples = [
        sample(0, "p", 1, pair_id=5),
        sample(1, "p", 0, pair_id=5),
        sample(2, "p", 1, pair_id=9),  # its other side was dropped
        sample(3, "p", 1),
        sample(4, "p", 0),
        sample(5, "p", 0),
    ]
    for seed in range(4):
        paired = match_pairs(as_samples(samples), seed)
        assert [item.where for item in paired[:3]] == ["0", "1", "3"]
        assert paired[3].where in ("4", "5")
        assert [item.pair_id for item in paired] == [5, 5, 10, 10]


def test_matches_do_not_depend_on_string_hashing():
    code = (
        "from test_pairing import *\n"
        "s = made_of([('pqrstuv'[i % 7], (i // 7) % 2) for i in range(70)])\n"
        "print([x.where for x in match_pairs(s, 3)])"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([here, *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_keep():
    samples = made_of([("p", 1), ("p", 0), ("q", 1)])
    assert [item.where for item in keep_labels(samples, "positive")] == ["0", "2"]
    assert [item.where for item in keep_labels(samples, "negative")] == ["1"]
    assert [item.where for item in keep_labels(samples, "all")] == ["0", "1", "2"]
