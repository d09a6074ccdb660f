"""One row for several sequences that holds every common prefix once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipa_openrlhf.data.prefixes import lexicographic


@dataclass(frozen=True)
class SharedRow:
    """What the L tokens of a row stand for, in which prefixes are shared: B sequences, the longest of W tokens.

    Attributes:
        sequence_index: [B, W] place in the row of every token of every sequence, 0 where padded.
        row_index: [L] place in [B * W] where a token of the row occurs first.
        repeats: of every prefix that occurred before, stretch by stretch: begin and end of a stretch in the row, and
            the place in [B * W] where its copy begins.
    """

    sequence_index: torch.Tensor
    row_index: torch.Tensor
    repeats: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedRow":
        """The same on ``device``."""
        sequence_index, row_index = (
            one.to(device, non_blocking=non_blocking) for one in (self.sequence_index, self.row_index)
        )
        return SharedRow(sequence_index, row_index, self.repeats)


def share_prefixes(sequences: list[np.ndarray]) -> tuple[list[np.ndarray], SharedRow]:
    """Lay out the prefix tree of B sequences in one row, each of its L tokens once.

    Returns:
        Per sequence [length] the places of its tokens in the row, and the row.
    """
    width = max(map(len, sequences))
    padded = np.zeros((len(sequences), width), dtype=np.int64)
    places = [padded[:0, 0]] * len(sequences)
    row_index: list[np.ndarray] = []
    repeats: list[tuple[int, int, int]] = []
    used, before = 0, padded[:0, 0]
    for number, shared in zip(*lexicographic(sequences)):
        own = np.arange(shared, len(sequences[number]))
        repeats += _stretches(before[:shared], number * width)
        places[number] = before = np.concatenate([before[:shared], used - shared + own])
        padded[number, : len(before)] = before
        row_index.append(number * width + own)
        used += len(own)
    return places, SharedRow(torch.from_numpy(padded), torch.from_numpy(np.concatenate(row_index)), tuple(repeats))


def _stretches(places: np.ndarray, copy: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of a row that ``places`` run through, as in ``SharedRow.repeats``; their copy begins at ``copy``."""
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    for start, end in zip(starts, [*starts[1:], len(places)]):
        yield int(places[start]), int(places[start] + end - start), copy + int(start)
