"""Order of the data, its independence of ranks, and how much of a padded batch is padding."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipa_openrlhf.data.plan import (
    Grouping,
    global_batches,
    rank_micro_batches,
    token_budget_batches,
)
from pipa_openrlhf.distributed.upstream import DistributedSampler
from pipa_openrlhf.generation.word_problems import generate_problems


def lognormal_lengths(number: int, seed: int = 0) -> np.ndarray:
    return np.maximum(8, np.random.default_rng(seed).lognormal(5.0, 0.6, number)).astype(np.int64)


def padding(micro_batches, lengths) -> float:
    padded = sum(len(batch) * lengths[batch].max() for batch in micro_batches if len(batch))
    return 1 - sum(lengths[batch].sum() for batch in micro_batches) / padded


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ungrouped_order_is_upstreams(world_size):
    """What upstream's sampler hands to each rank, batch by batch, is what our ranks run."""
    batches = global_batches(num_units=64, batch_size=16, seed=7, epoch=3)
    for rank in range(world_size):
        sampler = DistributedSampler(range(64), num_replicas=world_size, rank=rank, shuffle=True, seed=7)
        sampler.set_epoch(3)
        upstream = list(sampler)
        micro_batches = [micro for batch in batches for micro in rank_micro_batches(batch, rank, world_size, 3)]
        ours = [unit for micro in micro_batches for unit in micro]
        assert ours == upstream


@given(
    num_units=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 5),
    micro=st.integers(1, 9),
    grouped=st.sampled_from(["", "by length", "by length and prompt"]),
)
def test_every_unit_is_run_once_an_epoch(num_units, batch_size, world_size, micro, grouped):
    prompts = np.random.default_rng(0).integers(0, num_units, num_units) if "prompt" in grouped else None
    grouping = Grouping(lognormal_lengths(num_units), prompts) if grouped else None
    batches = global_batches(num_units, batch_size, seed=1, epoch=0, grouping=grouping)
    assert sorted(np.concatenate(batches)) == list(range(num_units))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for batch in batches:
        plans = [rank_micro_batches(batch, rank, world_size, micro, grouping) for rank in range(world_size)]
        assert len({len(plan) for plan in plans}) == 1, "every rank runs the same number of micro-batches"
        assert all(len(units) <= micro for plan in plans for units in plan)
        assert sorted(unit for plan in plans for units in plan for unit in units) == sorted(batch)


def quickstart_lengths(number: int) -> np.ndarray:
    """Of the problems that the quickstart trains on, with worked answers."""
    problems = islice(generate_problems("train", 0, 2), number)
    return np.array([len(problem.question) + sum(map(len, problem.steps)) for problem in problems])


@pytest.mark.parametrize("lengths_of", [lognormal_lengths, quickstart_lengths])
@pytest.mark.parametrize("batch_size, micro", [(16, 16), (16, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_leaves_at_most_five_percent_padding(lengths_of, batch_size, micro, world_size):
    lengths = lengths_of(2000)
    run = [
        units
        for batch in global_batches(2000, batch_size, seed=0, epoch=0, grouping=Grouping(lengths))
        for rank in range(world_size)
        for units in rank_micro_batches(batch, rank, world_size, micro, Grouping(lengths))
    ]
    assert padding(run, lengths) <= 0.05
    ungrouped = global_batches(2000, batch_size, seed=0, epoch=0)
    shares = [units for batch in ungrouped for units in rank_micro_batches(batch, 0, 1, micro)]
    assert padding(shares, lengths) > 0.15, "the lengths are spread enough for the test to mean something"


def test_grouped_batches_are_shuffled_and_differ_by_epoch():
    lengths = lognormal_lengths(800)
    first, second = (global_batches(800, 8, seed=0, epoch=epoch, grouping=Grouping(lengths)) for epoch in (0, 1))
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4
    assert any(set(one) != set(other) for one, other in zip(first, second))
    again = global_batches(800, 8, seed=0, epoch=0, grouping=Grouping(lengths))
    assert all((one == other).all() for one, other in zip(first, again))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 2000))
def test_token_budget_batches(lengths, budget):
    batches = token_budget_batches(Grouping(np.array(lengths)), np.zeros(len(lengths)), budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def shared_tokens(batches, lengths, prompts, prompt_length) -> int:
    """Tokens that go through the model when each batch holds each prompt once."""
    return sum(
        lengths[batch].sum() - prompt_length * (len(batch) - len(set(prompts[batch])))
        for batch in batches
        if len(batch)
    )


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch_size, micro", [(32, 8), (128, 16)])
def test_eight_answers_a_prompt_keep_four_fifths_of_the_tokens(batch_size, micro, world_size):
    """A prompt that is a quarter of every sequence, eight answers: 0.78 of the tokens are left."""
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(100), 8))
    lengths = np.full(800, 256)
    grouping = Grouping(lengths, prompts)
    run = [
        units
        for batch in global_batches(800, batch_size, seed=0, epoch=0, grouping=grouping)
        for rank in range(world_size)
        for units in rank_micro_batches(batch, rank, world_size, micro, grouping)
    ]
    assert shared_tokens(run, lengths, prompts, 64) / lengths.sum() == pytest.approx(0.78, abs=0.005)


def test_answers_to_one_prompt_stay_together_and_prompts_are_shuffled():
    prompts = np.repeat(np.arange(100), 8)
    lengths = lognormal_lengths(800)
    first, second = (
        global_batches(800, 32, seed=0, epoch=epoch, grouping=Grouping(lengths, prompts)) for epoch in (0, 1)
    )
    together = [len(set(prompts[batch])) for batch in first]
    assert max(together) <= 5, "32 answers of about four problems"
    assert any(set(one) != set(other) for one, other in zip(first, second))


def test_who_shares_a_batch_differs_by_epoch_where_lengths_are_equal():
    """Ties are broken by the shuffle, not by the order of the file."""
    prompts = np.repeat(np.arange(100), 4)
    grouping = Grouping(np.full(400, 50), prompts)
    batches = [global_batches(400, 16, seed=0, epoch=epoch, grouping=grouping) for epoch in (0, 1)]
    together = [{frozenset(prompts[batch].tolist()) for batch in one} for one in batches]
    assert len(together[0] & together[1]) < 3
    neighbours = [abs(np.diff(sorted(set(prompts[batch].tolist())))).mean() for batch in batches[0]]
    assert np.mean(neighbours) > 5, "prompts that stand side by side in the file do not share a batch"


def test_answers_stay_together_in_more_data_than_is_sorted_at_once():
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(500), 4))
    grouping = Grouping(lognormal_lengths(2000), prompts)
    batches = global_batches(2000, 4, seed=0, epoch=0, grouping=grouping)
    assert np.mean([len(set(prompts[batch])) for batch in batches]) < 1.1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=60), st.integers(1, 2000))
def test_token_budget_batches_that_share_prompts(answers, budget):
    prompts, answer_lengths = np.array(answers).T
    prompt_lengths = 1 + prompts * 10
    lengths = prompt_lengths + answer_lengths
    batches = token_budget_batches(Grouping(lengths, prompts), prompt_lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        unique = {prompts[index]: prompt_lengths[index] for index in batch}
        tokens = answer_lengths[batch].sum() + sum(unique.values())
        assert len(batch) == 1 or (tokens <= budget and len(batch) * lengths[batch].max() <= 2 * budget)
