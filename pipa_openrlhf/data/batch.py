"""Samples to tensors: one micro-batch, padded, packed into one row, or in one row with shared prefixes."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch

from pipa_openrlhf.data.prefixes import SharedRow, share_prefixes
from pipa_openrlhf.data.samples import Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences; T is its longest response. Response tensors are aligned with each other.

    Attributes:
        input_ids, position_ids: [B, L] right-padded, or [1, L] in one row; each sequence's positions from 0, an
            answer's from its prompt's end.
        attention_mask: [B, L], or None for one row: transformers sees from the positions what a packed row holds.
        hidden_index: [M] flat positions of the hidden states that predict the wanted response tokens.
        targets: [M] ids of those tokens.
        token_index: [N] flat positions in [B * T] of the wanted tokens.
        score_index: [N] which of the M scores (log f, u) is a wanted token's, never falling; None: one each, N = M.
        labels, mask, step_ids: [B, T], c_t, m_t and the step that a token belongs to.
        log_p: [B, T] float32 log-probs under the prior; zeros where the objective has none.
        answer_label: [B].
        weight: [B] float32, multiplies an answer's loss; a pair's is that of its chosen side.
        shared_row: what ``input_ids`` stand for where sequences share their prefixes.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    hidden_index: torch.Tensor
    targets: torch.Tensor
    token_index: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    step_ids: torch.Tensor
    log_p: torch.Tensor
    answer_label: torch.Tensor
    weight: torch.Tensor
    score_index: torch.Tensor | None = None
    shared_row: SharedRow | None = None

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[M] scores to [B, T], where the wanted tokens are; 0 at the others."""
        if self.score_index is not None:
            values = values.index_select(0, self.score_index)
        zeros = values.new_zeros(self.labels.numel())
        return zeros.index_copy(0, self.token_index, values).view(self.labels.shape)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return map_tensors(self, lambda one: one.to(device, non_blocking=True))


_Holder = TypeVar("_Holder")


def map_tensors(holder: _Holder, function: Callable[[torch.Tensor], torch.Tensor]) -> _Holder:
    """A copy of a dataclass with ``function`` of each of its tensors, and of those of dataclasses within."""
    changed: dict[str, Any] = {}
    for field in fields(cast(Any, holder)):
        value = getattr(holder, field.name)
        if torch.is_tensor(value):
            changed[field.name] = function(value)
        elif is_dataclass(value):
            changed[field.name] = map_tensors(value, function)
    return replace(cast(Any, holder), **changed)


def collate(
    samples: list[Sample],
    log_p: list[np.ndarray] | None,
    pad_token_id: int,
    layout: str,
    every_response_token: bool = False,
    keep_last_token: bool = False,
) -> Batch:
    """Build a micro-batch. The last token of a sequence is a target only, as nothing is predicted from it.

    Args:
        samples: B of them.
        log_p: per sample [T_i] prior log-probs, or None.
        layout: ``padded``: a row a sequence; ``packed``: all sequences in one row, told apart by their positions;
            ``shared``: all in one row with every common prefix once, laid out as separate sequences in attention
            alone.
        every_response_token: ask the model for all response tokens (the prior pass) rather than the labelled ones.
        keep_last_token: run it through the model all the same, for the balancing loss of experts.
    """
    sequences = [sample.input_ids if keep_last_token else sample.input_ids[:-1] for sample in samples]
    if layout == "shared" and len(samples) > 1:
        placed = _shared_layout(sequences)
    elif layout == "packed":
        placed = _packed_layout(sequences)
    else:
        placed = _padded_layout(sequences, pad_token_id)

    longest = max(len(sample.labels) for sample in samples)
    hidden_index, targets, token_index = _wanted(samples, placed.places, longest, every_response_token)
    score_index = None
    if placed.shared_row is not None:
        hidden_index, targets, token_index, score_index = _distinct_scores(hidden_index, targets, token_index)

    prior = [np.zeros(len(sample.labels), dtype=np.float32) for sample in samples] if log_p is None else log_p
    return Batch(
        input_ids=_tensor(placed.input_ids),
        position_ids=_tensor(placed.position_ids),
        attention_mask=None if placed.attention_mask is None else _tensor(placed.attention_mask),
        hidden_index=_tensor(hidden_index),
        targets=_tensor(targets),
        token_index=_tensor(token_index),
        score_index=None if score_index is None else _tensor(score_index),
        labels=_tensor(_pad([sample.labels for sample in samples], longest, 0)),
        mask=_tensor(_pad([sample.mask for sample in samples], longest, 0)),
        step_ids=_tensor(_pad([sample.step_ids for sample in samples], longest, 0)),
        log_p=torch.from_numpy(_pad(prior, longest, 0.0)),
        answer_label=torch.tensor([sample.answer_label for sample in samples]),
        weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        shared_row=placed.shared_row,
    )


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of sequences are. ``places`` holds, per sequence, the flat position of each of its tokens."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    places: list[np.ndarray]
    attention_mask: np.ndarray | None = None
    shared_row: SharedRow | None = None


def _padded_layout(sequences: list[np.ndarray], pad_token_id: int) -> _Layout:
    width = max(map(len, sequences))
    return _Layout(
        input_ids=_pad(sequences, width, pad_token_id),
        position_ids=np.tile(np.arange(width), (len(sequences), 1)),
        places=[row * width + np.arange(len(ids)) for row, ids in enumerate(sequences)],
        attention_mask=_pad([np.ones(len(ids), dtype=np.int64) for ids in sequences], width, 0),
    )


def _packed_layout(sequences: list[np.ndarray]) -> _Layout:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])[:-1]])
    return _Layout(
        input_ids=np.concatenate(sequences)[None],
        position_ids=np.concatenate([np.arange(len(ids)) for ids in sequences])[None],
        places=[start + np.arange(len(ids)) for start, ids in zip(starts, sequences)],
    )


def _shared_layout(sequences: list[np.ndarray]) -> _Layout:
    places, shared_row = share_prefixes(sequences)
    size = len(shared_row.row_index)
    input_ids, position_ids = np.empty((1, size), dtype=np.int64), np.empty((1, size), dtype=np.int64)
    for ids, held in zip(sequences, places):
        input_ids[0, held] = ids
        position_ids[0, held] = np.arange(len(ids))
    return _Layout(input_ids, position_ids, places, shared_row=shared_row)


def _wanted(
    samples: list[Sample], places: list[np.ndarray], longest: int, every_response_token: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N] each: ``hidden_index``, ``targets`` and ``token_index`` of the wanted tokens, sample after sample.

    Args:
        places: per sample, as in :class:`_Layout`.
        longest: tokens of the longest response.
    """
    parts = []
    for row, (sample, held) in enumerate(zip(samples, places)):
        wanted = _wanted_tokens(sample, every_response_token)
        first = sample.prompt_len
        parts.append((held[first - 1 + wanted], sample.input_ids[first + wanted], row * longest + wanted))
    hidden_index, targets, token_index = map(np.concatenate, zip(*parts))
    return hidden_index, targets, token_index


def _distinct_scores(
    hidden_index: np.ndarray, targets: np.ndarray, token_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Wanted tokens sorted by what predicts them, and by target: the four index arrays of a :class:`Batch`.

    Args:
        hidden_index, targets, token_index: [N].
    """
    order = np.lexsort((targets, hidden_index))
    hidden_index, targets, token_index = hidden_index[order], targets[order], token_index[order]
    is_new = np.ones(len(order), dtype=np.bool_)
    is_new[1:] = (np.diff(hidden_index) != 0) | (np.diff(targets) != 0)
    score_index = None if is_new.all() else np.cumsum(is_new) - 1
    return hidden_index[is_new], targets[is_new], token_index, score_index


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _wanted_tokens(sample: Sample, every_response_token: bool) -> np.ndarray:
    """Indices of response tokens to score; the very first token of a sequence has nothing that predicts it."""
    if not every_response_token:
        return np.flatnonzero(sample.mask)
    first = 1 if sample.prompt_len == 0 else 0
    return np.arange(first, len(sample.labels))


def _pad(rows: list[np.ndarray], width: int, value: float) -> np.ndarray:
    padded = np.full((len(rows), width), value, dtype=rows[0].dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded
