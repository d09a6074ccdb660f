"""Order of the data, its independence of ranks, and how a global batch is cut into micro-batches."""

from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openrlhf.utils.distributed_sampler import DistributedSampler
from prefix_trees import nodes_of
from tiny import make_model

from pipa_openrlhf.data.plan import UnitSizes, cut, global_batches, rank_micro_batches
from pipa_openrlhf.model.policy import Policy
from recipes.word_problems.problems import generate_problems

LAYOUTS = ("padded", "packed", "shared")


def lognormal_lengths(number: int, seed: int = 0) -> np.ndarray:
    return np.maximum(8, np.random.default_rng(seed).lognormal(5.0, 0.6, number)).astype(np.int64)


def sizes_of(lengths, layout="padded", prompts=None, prompt_lengths=None, attention=0.0) -> UnitSizes:
    """Of answers that have only their prompt in common."""
    number = len(lengths)
    prompts = np.arange(number) if prompts is None else np.asarray(prompts)
    prompt_lengths = np.zeros(number, dtype=np.int64) if prompt_lengths is None else np.asarray(prompt_lengths)

    def sequence(unit: int) -> np.ndarray:
        prompt = np.full(prompt_lengths[unit], prompts[unit])
        return np.concatenate([prompt, np.full(lengths[unit] - len(prompt), number + unit)])

    sequences = {"sequences_of": lambda units: [sequence(unit) for unit in units], "attention": attention}
    return UnitSizes(np.asarray(lengths), prompts, layout, **sequences)


def padding(micro_batches, lengths) -> float:
    padded = sum(len(batch) * lengths[batch].max() for batch in micro_batches if len(batch))
    return 1 - sum(lengths[batch].sum() for batch in micro_batches) / padded


def all_micro_batches(batch, world_size, micro, sizes=None) -> list[np.ndarray]:
    return [units for rank in range(world_size) for units in rank_micro_batches(batch, rank, world_size, micro, sizes)]


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
    layout=st.sampled_from(["by count", *LAYOUTS]),
)
@settings(deadline=None)
def test_every_unit_is_run_once_an_epoch(num_units, batch_size, world_size, micro, layout):
    prompts = np.random.default_rng(0).integers(0, num_units, num_units)
    lengths, prompt_lengths = lognormal_lengths(num_units), 1 + prompts % 7
    sizes = None if layout == "by count" else sizes_of(lengths, layout, prompts, prompt_lengths)
    batches = global_batches(num_units, batch_size, seed=1, epoch=0, prompts=prompts if sizes else None)
    assert sorted(np.concatenate(batches)) == list(range(num_units))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for batch in batches:
        plans = [rank_micro_batches(batch, rank, world_size, micro, sizes) for rank in range(world_size)]
        assert len({len(plan) for plan in plans}) == 1, "every rank runs the same number of micro-batches"
        assert sorted(unit for plan in plans for units in plan for unit in units) == sorted(batch)
        for units in (units for plan in plans for units in plan if len(units)):
            if sizes is None:
                assert len(units) <= micro
            else:
                assert len(units) == 1 or tokens_of(units, sizes) <= micro * lengths.max()


def tokens_of(units, sizes) -> int:
    """Tokens of a micro-batch by their definition, layout by layout."""
    lengths = sizes.lengths[units]
    if sizes.layout == "padded":
        return len(units) * lengths.max()
    return lengths.sum() if sizes.layout == "packed" else nodes_of(sizes.sequences_of(np.asarray(units)))


@given(
    answers=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=60),
    budget=st.integers(1, 2000),
    layout=st.sampled_from(LAYOUTS),
)
@settings(deadline=None)
def test_a_cut_keeps_to_its_budget_and_takes_what_fits(answers, budget, layout):
    prompts, answer_lengths = np.array(answers).T
    prompt_lengths = 1 + prompts * 10
    sizes = sizes_of(prompt_lengths + answer_lengths, layout, prompts, prompt_lengths)
    line = sizes.line_up(np.arange(len(answers)))

    def fits(units) -> bool:
        inside_attention = len(units) * sizes.lengths[units].max()
        return tokens_of(units, sizes) <= budget and (layout != "shared" or inside_attention <= 2 * budget)

    parts = [line.units[part] for part in cut(line, budget)]
    assert np.concatenate(parts).tolist() == line.units.tolist()
    for part, following in zip(parts, [*parts[1:], None]):
        assert len(part) == 1 or fits(part)
        if following is not None:
            assert not fits(np.concatenate([part, following[:1]])), "the next one would not have fitted"


few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@given(
    units=st.lists(st.tuples(st.integers(0, 3), few_tokens, few_tokens), min_size=1, max_size=20),
    unit_size=st.sampled_from([1, 2]),
    start=st.integers(0, 19),
)
def test_a_shared_micro_batch_costs_the_tokens_of_its_prefix_tree(units, unit_size, start):
    """Answers and pairs, with anything in common: within a prompt and across, one the beginning of another, the same
    one twice, no prompt at all; from any unit on."""
    of_units = [[np.array(one) for one in unit[1 : 1 + unit_size]] for unit in units]
    lengths = np.array([max(map(len, sequences)) for sequences in of_units])
    prompts = np.array([prompt for prompt, *_ in units])
    inputs = [lambda some: [ids for unit in some for ids in of_units[unit]], unit_size]
    sizes = UnitSizes(lengths, prompts, "shared", *inputs)
    line = sizes.line_up(np.arange(len(units)))
    start = min(start, len(units) - 1)
    expected = []
    for end in range(start + 1, len(units) + 1):
        chosen = line.units[start:end]
        padded = len(chosen) * lengths[chosen].max()
        expected.append(max(nodes_of(sizes.sequences_of(chosen)) / unit_size, padded / 2))
    assert line.costs(start, len(units))[0].tolist() == expected
    for budget in {1, *expected}:
        assert line.fitting(start, budget) == sum(cost <= budget for cost in expected)


def test_answers_to_one_prompt_stand_side_by_side_in_the_order_of_their_tokens():
    sequences = [np.array(ids) for ids in ([7, 2, 1], [8, 1], [7, 1, 9], [8, 0], [7, 2, 0], [7, 1, 9, 9])]
    lengths, prompts = np.array([len(ids) for ids in sequences]), np.array([0, 1, 0, 1, 0, 0])
    sizes = UnitSizes(lengths, prompts, "shared", lambda units: [sequences[unit] for unit in units])
    assert sizes.line_up(np.arange(6)).units.tolist() == [2, 5, 4, 0, 3, 1]
    assert sizes.line_up(np.array([3, 0, 4])).units.tolist() == [4, 0, 3]


def test_stretches_keep_a_prompt_together_without_its_tokens():
    prompts = np.array([0, 1, 0, 1, 0, 0])
    sizes = UnitSizes(np.array([3, 9, 3, 1, 3, 4]), prompts, "shared")
    stretches = [part.tolist() for part in sizes.stretches(np.arange(6), 2)]
    assert stretches == [[1, 3], [5, 0], [2, 4]], "the longer prompt first, its longer answers first"


def test_eight_answers_that_begin_alike_are_counted_by_what_they_add():
    """Seven eighths of every answer in common: a micro-batch of two answers' tokens holds four, by the half of what
    they are when padded, where sharing the prompt alone would let it hold two."""
    answers = np.arange(8)
    sequences = [np.concatenate([np.arange(70), np.full(10, 100 + answer)]) for answer in answers]
    sizes = UnitSizes(np.full(8, 80), 0 * answers, "shared", lambda units: [sequences[unit] for unit in units])
    assert [len(units) for units in all_micro_batches(answers, 1, 2, sizes)] == [4, 4]


def test_a_cut_goes_beyond_the_stretch_it_looks_at_first():
    line = sizes_of(np.full(1000, 2)).line_up(np.arange(1000))
    assert [part.stop - part.start for part in cut(line, 1400)] == [700, 300]


@cache
def quickstart_lengths(number: int) -> np.ndarray:
    """Of the problems that the quickstart trains on, with worked answers."""
    problems = islice(generate_problems("train", 0, 2), number)
    return np.array([len(problem.question) + sum(map(len, problem.steps)) for problem in problems])


@pytest.mark.parametrize("lengths_of", [lognormal_lengths, quickstart_lengths])
@pytest.mark.parametrize("batch_size, micro", [(16, 16), (16, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_at_most_five_percent_padding(lengths_of, batch_size, micro, world_size):
    lengths = lengths_of(1000)
    run = [
        units
        for batch in global_batches(1000, batch_size, seed=0, epoch=0, prompts=np.arange(1000))
        for units in all_micro_batches(batch, world_size, micro, sizes_of(lengths))
    ]
    assert padding(run, lengths) <= 0.05
    by_count = [
        units
        for batch in global_batches(1000, batch_size, seed=0, epoch=0)
        for units in rank_micro_batches(batch, 0, 1, micro)
    ]
    assert padding(by_count, lengths) > 0.15, "the lengths are spread enough for the test to mean something"


def test_micro_batches_of_a_batch_have_similar_sizes():
    """With nothing padded, four ranks have a quarter of the tokens each, give or take a unit."""
    lengths = lognormal_lengths(256)
    run = all_micro_batches(np.arange(256), 4, 32, sizes_of(lengths, "packed"))
    assert len(run) == 4
    tokens = [lengths[units].sum() for units in run]
    assert max(tokens) - min(tokens) <= lengths.max()


def work_of(units, sizes) -> float:
    """Of a micro-batch by its definition: tokens, and what attention adds, in the shared layout padded."""
    lengths = sizes.lengths[units].astype(float)
    squares = (lengths**2).sum() if sizes.layout == "packed" else len(lengths) * lengths.max() ** 2
    return tokens_of(units, sizes) + sizes.attention * squares


@given(
    answers=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=60),
    max_tokens=st.integers(1, 2000),
    world_size=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    unit_size=st.sampled_from([1, 2]),
    by_size=st.booleans(),
)
@settings(deadline=None)
def test_micro_batches_of_a_number_of_tokens(answers, max_tokens, world_size, layout, unit_size, by_size):
    """Of a pair, every number is of one of its two answers, which are the same here."""
    prompts, answer_lengths = np.array(answers).T
    prompt_lengths = 1 + prompts * 10
    one = sizes_of(prompt_lengths + answer_lengths, layout, prompts, prompt_lengths, attention=0.01)

    def twice(units):
        return [ids for unit in one.sequences_of(units) for ids in (unit, unit + 1000)][: len(units) * unit_size]

    sizes = one if unit_size == 1 else replace(one, unit_size=2, sequences_of=twice)
    batch = np.random.default_rng(0).permutation(len(answers))
    options = {"sizes": sizes, "max_tokens": max_tokens, "by_size": by_size}
    plans = [rank_micro_batches(batch, rank, world_size, 1, **options) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1, "every rank runs the same number of micro-batches"
    assert sorted(unit for plan in plans for units in plan for unit in units) == sorted(batch)
    for units in (units for plan in plans for units in plan if len(units)):
        assert len(units) == 1 or unit_size * tokens_of(units, one) <= max_tokens
    if not by_size:
        assert [np.concatenate(plan).tolist() for plan in plans] == [
            batch[rank::world_size].tolist() for rank in range(world_size)
        ]
    again = [rank_micro_batches(batch, rank, world_size, 1, **options) for rank in reversed(range(world_size))]
    for plan, other in zip(plans, reversed(again)):
        assert [units.tolist() for units in plan] == [units.tolist() for units in other]


def test_a_given_number_of_tokens_takes_the_place_of_the_longest():
    lengths = np.array([10] * 8 + [1000])
    sizes = sizes_of(lengths, "packed")
    assert sorted(map(len, all_micro_batches(np.arange(9), 1, 1, sizes))) == [1, 8]
    plan = rank_micro_batches(np.arange(9), 0, 1, 1, sizes, 40)
    assert sorted(map(len, plan)) == [1, 4, 4]
    pairs = rank_micro_batches(np.arange(9), 0, 1, 1, replace(sizes, unit_size=2), 40)
    assert sorted(map(len, pairs)) == [1, 2, 2, 2, 2], "both answers count"


def test_even_work_is_no_reason_to_exceed_the_tokens():
    """Work of 42, 42, 20, 20 and 20: 82 beside 62 would be more even than 84 beside 60, but is 14 tokens."""
    sizes = sizes_of([6, 6, 4, 4, 4], "packed", attention=1.0)
    plans = [rank_micro_batches(np.arange(5), rank, 2, 1, sizes, 12) for rank in range(2)]
    assert sorted(sizes.lengths[units].sum() for [units] in plans) == [12, 12]


@pytest.mark.parametrize(
    "layout, expected",
    [
        ("padded", 3 * 10 + 0.1 * 3 * 10**2),
        ("packed", (10 + 8 + 2) + 0.1 * (10**2 + 8**2 + 2**2)),
        ("shared", (10 + 8 + 2 - 3) + 0.1 * 3 * 10**2),  # padded inside attention
    ],
)
def test_work_is_tokens_and_attention(layout, expected):
    """Of answers of 10, 8 and 2 tokens, the first two to one prompt of 3."""
    line = sizes_of([10, 8, 2], layout, [0, 0, 1], [3, 3, 1], attention=0.1).line_up(np.arange(3))
    assert line.work(slice(0, 3)) == pytest.approx(expected)


def test_attention_beside_the_weights_of_a_model():
    """Two layers of hidden size 16: four matrices of attention, three of 16 x 32, two norms; and the last norm. The
    table of embeddings multiplies nothing."""
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    policy = Policy(make_model(0))
    assert policy.attention_work == pytest.approx(2 * 16 / weights)
    for parameter in policy.parameters():  # as ZeRO-3 leaves them to a rank
        parameter.ds_numel = parameter.numel()
        parameter.data = parameter.data.new_empty(0)
    assert policy.attention_work == pytest.approx(2 * 16 / weights)


def waiting(batches, sizes, world_size, budget) -> float:
    """Share of the time in which ranks wait for the one of most work."""
    work = [
        [[work_of(units, sizes) if len(units) else 0.0 for units in plan] for plan in plans]
        for plans in (
            [rank_micro_batches(batch, rank, world_size, 1, sizes, budget) for rank in range(world_size)]
            for batch in batches
        )
    ]
    columns = np.concatenate(work, axis=1)
    return 1 - columns.mean() / columns.max(axis=0).mean()


@pytest.mark.parametrize("layout, most", [("packed", 0.01), ("padded", 0.04), ("shared", 0.05)])
def test_ranks_hardly_wait_for_each_other(layout, most):
    """Attention is some fifth of the work. With tokens balanced instead, in the order of the line, ranks wait for 10 %
    of the time where rows are packed, 8 % padded, and 14 % where eight answers share a prompt."""
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(128), 8))
    random = np.random.default_rng(2)
    lengths = 30 + np.exp(5 + 0.5 * random.normal(size=128)[prompts] + 0.3 * random.normal(size=1024)).astype(np.int64)
    sizes = sizes_of(lengths, layout, prompts, np.full(1024, 30), attention=1 / 1000)
    batches = global_batches(1024, 256, seed=0, epoch=0, prompts=prompts)
    assert waiting(batches, sizes, 8, 4000) <= most


def test_what_runs_beside_a_unit_of_much_work_has_much_too():
    """One unit of 1,000 tokens and 14 of 100 on two ranks. Cut into equal parts beside the long one, the others would
    be 500, 500 and 400."""
    lengths = np.array([1000] + [100] * 14)
    plans = [rank_micro_batches(np.arange(15), rank, 2, 1, sizes_of(lengths), 1000) for rank in range(2)]
    assert [[lengths[units].sum() for units in plan] for plan in plans] == [[1000, 200], [1000, 200]]


def synthetic_answers(problems: int, answers: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, labels and prompts: hard problems have long and mostly wrong answers."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1, problems)
    lengths = np.maximum(8, np.exp(5 + 0.4 * difficulty[:, None] + 0.3 * rng.normal(0, 1, (problems, answers))))
    labels = rng.random((problems, answers)) < 1 / (1 + np.exp(1.5 * difficulty))[:, None]
    return lengths.ravel().astype(np.int64), labels.ravel(), np.repeat(np.arange(problems), answers)


@pytest.mark.parametrize("answers", [1, 2, 8])
def test_length_does_not_decide_who_shares_a_batch(answers):
    """Batches differ in length and share of right answers as random sets of prompts do, no more: sorted by length,
    the longest batch of this data is several times the shortest and the share runs from 0.2 to 0.8."""
    lengths, labels, prompts = synthetic_answers(16384 // answers, answers, seed=0)
    batches = global_batches(len(lengths), 256, seed=0, epoch=0, prompts=prompts)
    means = np.array([lengths[batch].mean() for batch in batches])
    shares = np.array([labels[batch].mean() for batch in batches])
    problems_a_batch = 256 / answers
    assert means.max() / means.min() < 1 + 6 * 0.6 / np.sqrt(problems_a_batch)
    # A batch is a mean over independent problems: its share spreads by that of a problem over their root.
    of_a_problem = labels.reshape(-1, answers).mean(axis=1).std()
    assert np.abs(shares - labels.mean()).max() < 4 * of_a_problem / np.sqrt(problems_a_batch)
    sorted_batches = np.array_split(np.argsort(lengths), len(batches))
    assert max(labels[batch].mean() for batch in sorted_batches) > 0.75, "lengths and labels do hang together here"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch_size, micro", [(32, 8), (128, 16)])
def test_eight_answers_a_prompt_keep_four_fifths_of_the_tokens(batch_size, micro, world_size):
    """A prompt that is a quarter of every sequence, eight answers: 0.78 of the tokens are left where every prompt is
    in one micro-batch; micro-batches that hold one and a half prompts' answers more cost a little."""
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(100), 8))
    sizes = sizes_of(np.full(800, 256), "shared", prompts, np.full(800, 64))
    run = [
        units
        for batch in global_batches(800, batch_size, seed=0, epoch=0, prompts=prompts)
        for units in all_micro_batches(batch, world_size, micro, sizes)
    ]
    assert sum(tokens_of(units, sizes) for units in run if len(units)) / (800 * 256) <= 0.83


def test_answers_to_one_prompt_stay_together_and_prompts_are_shuffled():
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(500), 8))
    first, second = (global_batches(4000, 32, seed=0, epoch=epoch, prompts=prompts) for epoch in (0, 1))
    assert max(len(set(prompts[batch])) for batch in first) <= 5, "32 answers of four problems, or a rest and four"
    together = [{frozenset(prompts[batch].tolist()) for batch in one} for one in (first, second)]
    assert len(together[0] & together[1]) < 3
    again = global_batches(4000, 32, seed=0, epoch=0, prompts=prompts)
    assert all((one == other).all() for one, other in zip(first, again))
