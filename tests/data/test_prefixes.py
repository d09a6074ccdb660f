"""The row that holds every common prefix once, and what is asked of it, against the prefix tree's definition."""

from dataclasses import replace
from itertools import pairwise
from os.path import commonprefix

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from prefix_trees import branching_samples, nodes_of, priors
from samples import random_samples

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.prefixes import common_prefix, lexicographic, share_prefixes
from pipa_openrlhf.data.samples import Sample

VOCAB = 97
# Few tokens, so that much is shared; large ones, whose order is another one by bytes from the lowest.
token = st.sampled_from([0, 1, 255, 256, 70_000])
several = st.lists(st.lists(token, max_size=8), min_size=1, max_size=12)


@given(several)
def test_the_order_is_that_of_a_dictionary(sequences):
    order, shared = lexicographic([np.array(ids, dtype=np.int32) for ids in sequences])
    assert sorted(order) == list(range(len(sequences)))
    in_order = [sequences[number] for number in order]
    assert in_order == sorted(sequences)
    for place, (ids, size) in enumerate(zip(in_order, shared)):
        assert size == max((len(commonprefix([ids, one])) for one in in_order[:place]), default=0)


def test_a_common_prefix_ends_with_the_shorter_or_where_they_part():
    ids = np.array([3, 1, 2])
    others = {(): 0, (3,): 1, (3, 1, 2): 3, (3, 1, 2, 5): 3, (3, 2, 2): 1, (4, 1, 2): 0}
    assert {other: common_prefix(ids, np.array(other, dtype=int)) for other in others} == others


@given(several.filter(lambda sequences: any(sequences)))
@example([[0, 1, 255], [0, 1, 255], [0, 1], [0, 256]])
def test_a_row_holds_every_token_of_the_tree_once(sequences):
    places, row = share_prefixes([np.array(ids, dtype=np.int32) for ids in sequences])
    width = max(map(len, sequences))
    size = len(row.row_index)
    assert size == nodes_of(sequences)
    held: dict[int, list[int]] = {}
    for ids, own, padded in zip(sequences, places, row.block_index.tolist()):
        assert padded == [*own.tolist(), *[0] * (width - len(ids))]
        for place, prefix in zip(own.tolist(), (ids[:end] for end in range(1, len(ids) + 1))):
            assert held.setdefault(place, prefix) == prefix, "one place, one prefix"
    assert sorted(held) == list(range(size))
    assert row.block_index.flatten()[row.row_index].tolist() == list(range(size))


@given(several.filter(lambda sequences: any(sequences)))
def test_repeats_are_all_copies_and_nothing_else(sequences):
    _, row = share_prefixes([np.array(ids, dtype=np.int32) for ids in sequences])
    width = max(map(len, sequences))
    occurrences = {number * width + n for number, ids in enumerate(sequences) for n in range(len(ids))}
    copies = [copy + n for begin, end, copy in row.repeats for n in range(end - begin)]
    assert sorted([*copies, *row.row_index.tolist()]) == sorted(occurrences)
    flat = row.block_index.flatten().tolist()
    for begin, end, copy in row.repeats:
        assert begin < end and flat[copy : copy + end - begin] == list(range(begin, end))


@given(several.filter(lambda sequences: any(sequences)))
@example([[0], [0, 1, 255], [0, 1, 255], [0, 1, 0], [0, 256], [1, 1], [1, 0, 0]])
def test_in_a_tree_a_token_sees_itself_and_what_stands_before_it(sequences):
    places, row = share_prefixes([np.array(ids, dtype=np.int32) for ids in sequences])
    size = len(row.row_index)
    before = np.zeros((size, size), dtype=bool)
    for held in places:
        for end in range(len(held)):
            before[held[end], held[: end + 1]] = True
    roots = [held[0] for held in places if len(held)]
    widest = max(int(before[:, root].sum()) for root in roots)
    assert (row.trees is not None) == (len(set(roots)) * widest**2 < len(sequences) * max(map(len, sequences)) ** 2)
    if row.trees is None:
        return
    trees, visible = row.trees, row.trees.visible[:, 0]
    assert trees.repeats == () and trees.block_index.shape == (len(set(roots)), widest) == visible.shape[:2]
    assert trees.block_index.flatten()[trees.row_index].tolist() == list(range(size))
    assert visible.any(-1).all(), "a softmax over nothing is not a number"
    is_token = torch.zeros(len(set(roots)) * widest, dtype=torch.bool)
    is_token[trees.row_index] = True
    for block, seen, real in zip(trees.block_index.numpy(), visible.numpy(), is_token.view(-1, widest).numpy()):
        assert (seen[np.ix_(real, real)] == before[np.ix_(block[real], block[real])]).all()
        assert not seen[np.ix_(real, ~real)].any()


def sample_of(ids: list[int], prompt_len: int) -> Sample:
    """A prompt leaves at least one token; nothing predicts the first token of an answer without one."""
    prompt_len = min(prompt_len, len(ids) - 1)
    sample = random_samples([(prompt_len, len(ids) - prompt_len)], VOCAB)[0]
    sample.mask[: prompt_len == 0] = 0
    return replace(sample, input_ids=np.array(ids, dtype=np.int32))


answers = st.builds(sample_of, st.lists(token, min_size=2, max_size=8), st.integers(0, 7))


@given(st.lists(answers, min_size=2, max_size=10), st.booleans())
def test_every_wanted_token_finds_its_score(samples, every):
    batch = collate(samples, None, 0, "shared", every_response_token=every)
    separate = collate(samples, None, 0, "padded", every_response_token=every)
    score_index = np.arange(len(batch.targets)) if batch.score_index is None else batch.score_index.numpy()
    assert (np.diff(score_index) >= 0).all() and len(score_index) == len(batch.token_index)
    assert sorted(batch.token_index.tolist()) == separate.token_index.tolist()
    scores = set()
    longest = max(len(one.labels) for one in samples)
    for token_index, score in zip(batch.token_index.tolist(), score_index.tolist()):
        sample = samples[token_index // longest]
        place = sample.prompt_len + token_index % longest
        assert batch.targets[score] == sample.input_ids[place]
        assert batch.input_ids[0, batch.hidden_index[score]] == sample.input_ids[place - 1]
        assert batch.position_ids[0, batch.hidden_index[score]] == place - 1
        scores.add(tuple(sample.input_ids[: place + 1].tolist()))
    assert len(batch.targets) == len(scores), "one score a distinct beginning and target"


@given(several.filter(lambda sequences: any(sequences)))
@example([[0, 1, 255], [0, 256], [0, 1, 255], [0, 1], [], [256]])
def test_the_keys_of_a_query_are_what_it_follows_from_and_itself(sequences):
    places, row = share_prefixes([np.array(ids, dtype=np.int32) for ids in sequences])
    ids = np.zeros(len(row.row_index), dtype=np.int64)
    for held, tokens in zip(places, sequences):
        ids[held] = tokens
    query_ends, key_ends = row.keys.query_ends.tolist(), row.keys.key_ends.tolist()
    assert query_ends[0] == key_ends[0] == 0 and query_ends[-1] == len(ids) and key_ends[-1] == len(row.keys.index)
    assert max(np.diff(query_ends)) == row.keys.most_queries and max(np.diff(key_ends)) == row.keys.most_keys
    assert min(np.diff(query_ends)) > 0, "a kernel gets no empty sequence"
    seen = []
    for (first, end), key_end, key_start in zip(pairwise(query_ends), key_ends[1:], key_ends):
        for query in range(first, end):
            keys = row.keys.index[key_start : key_end - (end - 1 - query)].numpy()
            assert keys[-1] == query
            seen.append(tuple(ids[keys].tolist()))
    assert sorted(seen) == sorted({tuple(one[: end + 1]) for one in sequences for end in range(len(one))})


def test_the_order_of_samples_stays():
    samples = branching_samples(VOCAB)
    separate, shared = (collate(samples, priors(samples), 0, layout) for layout in ("padded", "shared"))
    for name in ("labels", "mask", "step_ids", "log_p", "answer_label", "weight"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(separate, name))
    assert shared.input_ids.shape == (1, nodes_of(one.input_ids[:-1] for one in samples))
    assert len(shared.targets) < len(shared.token_index) and shared.attention_mask is None


def test_nothing_is_shared_where_sequences_begin_differently():
    samples = [one for number, one in enumerate(branching_samples(VOCAB)) if number in (0, 7, 10)]
    batch = collate(samples, None, 0, "shared")
    assert batch.input_ids.shape == (1, 10 + 1 + 6) and not batch.shared_row.repeats and batch.score_index is None


def test_the_last_token_of_a_sequence_is_kept_where_it_is_asked_for():
    samples = branching_samples(VOCAB)
    batch = collate(samples, None, 0, "shared", keep_last_token=True)
    assert batch.input_ids.shape == (1, nodes_of(one.input_ids for one in samples))
