"""Samples that have more than their prompt in common, and the prefix tree by its definition."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from samples import random_samples

from pipa_openrlhf.data.samples import Sample

LENGTHS = [(4, 7), (4, 9), (4, 8), (4, 7), (4, 4), (5, 6), (0, 6), (0, 2), (5, 2), (3, 8), (2, 5), (1, 3)]
# Sample, the one that it begins like, and how many tokens: a prompt and some of the answer, a branch of a branch, the
# same sequence again, one that ends inside another, another prompt with a common beginning, an answer without a
# prompt, all of a sequence but its last token, and a sequence again whose prompt ends elsewhere.
COPIES = [(1, 0, 7), (2, 1, 9), (3, 0, 11), (4, 0, 8), (5, 0, 2), (6, 0, 3), (8, 5, 6), (9, 0, 11)]


def branching_samples(vocab_size: int) -> list[Sample]:
    """Samples of which none stands beside the one that it begins like in every case; labels, masks and weights of
    equal tokens differ."""
    samples = random_samples(LENGTHS, vocab_size)
    for number, source, size in COPIES:
        samples[number].input_ids[:size] = samples[source].input_ids[:size]
    samples[3].mask[2:5] = 0
    return [
        replace(one, labels=((one.labels + number) % 2).astype(np.int8), weight=1 + number / 4)
        for number, one in enumerate(samples)
    ]


def priors(samples: list[Sample]) -> list[np.ndarray]:
    """Log-probs under a prior, different for every token of every sample."""
    generator = np.random.default_rng(1)
    return [generator.normal(-2, 1, len(one.labels)).astype(np.float32) for one in samples]


def nodes_of(sequences: Iterable[Sequence[int] | np.ndarray]) -> int:
    """Tokens of the prefix tree, by walking down it."""
    children: dict[tuple[int, int], int] = {}
    for ids in sequences:
        node = 0
        for token in ids:
            node = children.setdefault((node, int(token)), len(children) + 1)
    return len(children)
