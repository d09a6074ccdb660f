"""The least FLOPs of a step, and prefix trees cut where prompts end."""

import sys
from pathlib import Path

import numpy as np
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import least  # noqa: E402
import ours  # noqa: E402

from pipa_openrlhf.data import batch as batch_module  # noqa: E402
from pipa_openrlhf.data import plan as plan_module  # noqa: E402
from pipa_openrlhf.data.samples import Sample  # noqa: E402
from pipa_openrlhf.model.policy import Policy  # noqa: E402

HIDDEN, MIDDLE, LAYERS, VOCABULARY = 16, 32, 2, 258


def sample(tokens: list[int], prompt: int, mask: list[int]) -> Sample:
    kinds = np.array(mask, dtype=np.int8)
    return Sample(np.array(tokens, dtype=np.int32), prompt, kinds, kinds, kinds.astype(np.int32), 1, "", None, "")


def test_the_least_is_two_passes_over_distinct_tokens_by_hand():
    policy = Policy(tiny.make_model(0))
    calls, hook = least.record_calls(policy)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        policy._backbone[0](input_ids=ids)
    assert not calls, "passes without gradients are the prior's"
    policy._backbone[0](input_ids=ids)
    hook.remove()
    # Every weight of a layer's products meets every token once: 2 FLOPs.
    a_token = 2 * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MIDDLE)
    # Scores and weighted values; the angles of the rotary embedding are a product too.
    attention = LAYERS * 2 * 2 * (2 * 6 * 6 * HIDDEN) + 2 * 6 * 4
    parts = least.least_parts(policy, calls, tokens=9, loss_tokens=4)
    assert parts["a"] == attention
    assert parts["2b"] == 2 * (9 * a_token + attention), "9 of the 12 tokens are distinct"
    assert parts["2h x loss tokens"] == 2 * 4 * 2 * HIDDEN * VOCABULARY


def test_distinct_tokens_by_hand():
    samples = [
        sample([1, 2, 3, 4], 2, [1, 1]),
        sample([1, 2, 3, 5], 2, [1, 1]),
        sample([1, 2, 3, 4], 2, [1, 1]),
        sample([1, 2, 9], 2, [0]),
    ]
    # Seen: 1, 1 2, 1 2 3. Scored: 1 2 3, 1 2 3 4, 1 2 3 5.
    assert ours.distinct(samples) == (3, 3)


def test_prompts_shared_alone_cuts_trees_where_prompts_end():
    sequences = [np.array(ids) for ids in ([1, 2, 5, 6], [1, 2, 5, 7], [1, 2, 5, 6], [3, 5])]
    assert len(batch_module.share_prefixes(sequences)[1].row_index) == 7
    with ours.prompts_shared_alone([[1, 2], [3]]):
        places, row = batch_module.share_prefixes(sequences)
        tree = plan_module.PrefixTree(sequences)
    assert len(row.row_index) == 2 + 3 * 2 + 2
    assert [list(one[:2]) for one in places[:3]] == [list(places[0][:2])] * 3, "the prompt is held once"
    assert len({place for one in places[:3] for place in one[2:]}) == 6, "answers are not"
    ranks = sorted(tree.ranks[:3])
    assert tree.common(ranks[0], ranks[1]) == tree.common(ranks[1], ranks[2]) == 2
    assert len(batch_module.share_prefixes(sequences)[1].row_index) == 7, "and only meanwhile"
