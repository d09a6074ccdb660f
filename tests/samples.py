"""Samples and batches of random tokens for tests of models."""

import numpy as np

from pipa_openrlhf.data.samples import Sample


def random_samples(lengths: list[tuple[int, int]], vocab_size: int, seed: int = 0) -> list[Sample]:
    """One sample for every (prompt length, response length); labels alternate."""
    generator = np.random.default_rng(seed)
    return [
        Sample(
            input_ids=generator.integers(0, vocab_size, prompt + response).astype(np.int32),
            prompt_len=prompt,
            labels=(np.arange(response) % 2).astype(np.int8),
            mask=np.ones(response, dtype=np.int8),
            step_ids=np.zeros(response, dtype=np.int32),
            answer_label=number % 2,
            problem_id=str(number),
            pair_id=None,
            where=f"sample {number}",
        )
        for number, (prompt, response) in enumerate(lengths)
    ]
