"""Mismatched completions, as KTO's reference point takes them, and the fingerprint of data."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import random_samples

from pipa_openrlhf.data.samples import Joined, as_samples
from pipa_openrlhf.data.training_set import Collator, MicroBatches, TrainingSet, unit_sizes
from pipa_openrlhf.objectives.kto import MismatchedCompletions, mismatched_completions


def test_a_mismatch_takes_the_next_answer_that_can_be_scored():
    """Without a prompt, nothing predicts the only token of the next answer: the one after it is taken."""
    samples = random_samples([(0, 5), (3, 1), (2, 4)], 50)
    mismatched = mismatched_completions(as_samples(samples), 100)
    np.testing.assert_array_equal(mismatched[0].input_ids, samples[2].input_ids[2:])
    assert mismatched[0].mask.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(mismatched[2].input_ids[:2], samples[2].input_ids[:2])
    np.testing.assert_array_equal(mismatched[2].input_ids[2:], samples[0].input_ids)


def test_no_mismatch_within_one_problem_or_beyond_the_longest():
    samples = random_samples([(4, 2), (4, 9)], 50)
    assert mismatched_completions(as_samples(samples), 10).partners.tolist() == [-1, 0]
    assert mismatched_completions(as_samples(samples[:1]), 100).partners.tolist() == [-1]


def next_usable(samples, index: int, max_len: int) -> int | None:
    """The definition, word by word: the next sample, cyclically, of another problem, that fits and can be scored."""
    own = samples[index]
    for step in range(1, len(samples)):
        other = (index + step) % len(samples)
        mask = samples[other].mask[0 if own.prompt_len else 1 :]
        fits = own.prompt_len + len(samples[other].labels) <= max_len
        if samples[other].problem_id != own.problem_id and fits and mask.any():
            return other
    return None


answers = st.tuples(st.integers(0, 6), st.integers(1, 6), st.sampled_from("aaaaab"), st.booleans())


@given(st.lists(answers, min_size=1, max_size=40), st.integers(2, 12))
def test_mismatches_follow_their_definition(rows, max_len):
    lengths = [(prompt, response) for prompt, response, _, _ in rows]
    samples = [
        replace(one, problem_id=problem, mask=one.mask if scored else np.eye(1, len(one.mask), dtype=np.int8)[0])
        for one, (_, _, problem, scored) in zip(random_samples(lengths, 1000), rows)
    ]
    mismatched = mismatched_completions(as_samples(samples), max_len)
    others = [next_usable(samples, index, max_len) for index in range(len(samples))]
    assert mismatched.partners.tolist() == [-1 if other is None else other for other in others]
    has_one = [index for index, other in enumerate(others) if other is not None]
    assert mismatched.of_rows(np.arange(len(samples))).tolist() == list(range(len(has_one)))
    for index, mismatch in zip(has_one, mismatched, strict=True):
        own, source = samples[index], samples[others[index]]
        assert mismatch.input_ids[: own.prompt_len].tolist() == own.input_ids[: own.prompt_len].tolist()
        assert mismatch.input_ids[own.prompt_len :].tolist() == source.input_ids[source.prompt_len :].tolist()
        assert mismatch.mask.tolist() == [int(source.mask[0] and own.prompt_len > 0), *source.mask[1:]]
        assert (mismatch.prompt_len, mismatch.problem_id) == (own.prompt_len, own.problem_id)
        assert (mismatch.answer_label, mismatch.pair_id) == (source.answer_label, None)
    plain = as_samples(list(mismatched))
    for name in ("length", "prompt_len", "prompt_key", "sequence_key"):
        assert mismatched.column(name).tolist() == plain.column(name).tolist()


def test_a_problem_that_dominates_takes_no_longer():
    """Most answers are of one problem, and the few others fit few prompts."""
    count = 100_000
    [short, long] = random_samples([(2, 2), (9, 2)], 50)
    kinds = as_samples([replace(one, problem_id=problem) for one in (short, long) for problem in ("same", "other")])
    numbers = np.arange(count)
    samples = kinds[numbers % 2 * 2 + (numbers % 50_000 == 7)]
    mismatched = mismatched_completions(samples, 10)  # a second or two; half an hour if all pairs are seen
    assert (mismatched.partners[:4] < 0).tolist() == [False, True, False, True]


SAMPLES = random_samples([(3, 4), (2, 4), (1, 2), (4, 4)], 50)
FIRST, *REST = SAMPLES


def set_of(samples, partners=None, **more) -> TrainingSet:
    columns = as_samples(samples)
    mismatched = None if partners is None else MismatchedCompletions(columns, np.array(partners))
    return TrainingSet(columns, mismatched=mismatched, **more)


OTHERS = {
    "tokens": set_of([replace(FIRST, input_ids=FIRST.input_ids + 1), *REST]),
    "span": set_of([replace(FIRST, prompt_len=2), *REST]),
    "labels": set_of([replace(FIRST, labels=1 - FIRST.labels), *REST]),
    "mask": set_of([replace(FIRST, mask=0 * FIRST.mask), *REST]),
    "steps": set_of([replace(FIRST, step_ids=FIRST.step_ids + 1), *REST]),
    "the answer's label": set_of([replace(FIRST, answer_label=1 - FIRST.answer_label), *REST]),
    "order": set_of(SAMPLES[::-1]),
    "fewer": set_of(REST),
    "pairs": set_of(SAMPLES, unit_size=2),
    "mismatches": set_of(SAMPLES, [-1, 0, 1, 2]),
    "other mismatches": set_of(SAMPLES, [1, 2, 3, -1]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_fingerprint_changes_with_what_a_loss_takes(what):
    same = set_of([replace(one, where="elsewhere", problem_id="other") for one in SAMPLES])
    assert same.fingerprint() == set_of(SAMPLES).fingerprint() != OTHERS[what].fingerprint()
    assert len({other.fingerprint() for other in OTHERS.values()}) == len(OTHERS)


def test_tokens_are_those_of_the_sample_in_every_kind_of_list():
    columns = as_samples(SAMPLES)
    mismatched = MismatchedCompletions(columns, np.array([1, 2, -1, 0]))
    lists = {
        columns: SAMPLES,
        columns[np.array([2, 0])]: [SAMPLES[2], SAMPLES[0]],
        mismatched: list(mismatched),
        Joined([columns, mismatched]): [*SAMPLES, *mismatched],
    }
    for samples, expected in lists.items():
        for index, sample in enumerate(expected):
            np.testing.assert_array_equal(samples.tokens(index), sample.input_ids)
            np.testing.assert_array_equal(samples[index].input_ids, sample.input_ids)


@pytest.mark.parametrize("unit_size", [1, 2])
def test_units_cost_what_the_model_is_given_of_all_their_answers(unit_size):
    sizes = unit_sizes(as_samples(SAMPLES), "shared", unit_size)
    line = sizes.line_up(np.array([1, 0]))
    assert sorted(line.units.tolist()) == [0, 1]
    for unit, ids in zip((0, 1), (SAMPLES[:unit_size], SAMPLES[unit_size : 2 * unit_size])):
        held = sizes.sequences_of(np.array([unit]))
        assert [one.tolist() for one in held] == [one.input_ids[:-1].tolist() for one in ids]
    assert line.costs(0, 2)[0][-1] == sum(len(one.input_ids) - 1 for one in SAMPLES[: 2 * unit_size]) / unit_size


def test_without_grouping_a_number_of_tokens_leaves_the_order_alone():
    samples = random_samples([(2, 3), (2, 1), (2, 6)], 50)
    data = TrainingSet(as_samples(samples), mismatched=mismatched_completions(as_samples(samples), 100))
    collator, units = Collator(None, 0, "padded", keep_last_token=True), np.array([1, 2, 0])
    micro_batches = MicroBatches(data, collator, 0, 1, 1, by_size=False, max_tokens=1000)
    assert micro_batches.prompts is None
    [answers], [mismatched] = micro_batches.answers(units), micro_batches.mismatched(units)
    assert len(mismatched.batch.labels) == 3
    for row, unit in zip(answers.batch.input_ids.tolist(), units, strict=True):
        ids = samples[unit].input_ids.tolist()
        assert row[: len(ids)] == ids
