"""Samples to tensors: one micro-batch, padded or packed into one row."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from pipa_openrlhf.data.tokenise import Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences; T is its longest response. Response tensors are aligned with each other.

    Attributes:
        input_ids, position_ids: [B, L] right-padded, or [1, L] packed, each sequence's positions from 0.
        attention_mask: [B, L], or None for a packed row (transformers derives the block mask from the positions).
        hidden_index: [N] flat positions of the hidden states that predict the wanted response tokens.
        targets: [N] ids of those tokens.
        token_index: [N] their flat positions in [B * T].
        labels, mask, step_ids: [B, T], c_t, m_t and the step that a token belongs to.
        log_p: [B, T] float32 log-probs under the prior; zeros where the objective has none.
        answer_label: [B].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    hidden_index: torch.Tensor
    targets: torch.Tensor
    token_index: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    step_ids: torch.Tensor
    log_p: torch.Tensor
    answer_label: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)


def collate(
    samples: list[Sample],
    log_p: list[np.ndarray] | None,
    pad_token_id: int,
    packed: bool,
    every_response_token: bool = False,
) -> Batch:
    """Build a micro-batch.

    Args:
        samples: B of them.
        log_p: per sample [T_i] prior log-probs, or None.
        packed: put all sequences into one row.
        every_response_token: ask the model for all response tokens (the prior pass) rather than the labelled ones.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    width = max(lengths)
    if packed:
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        input_ids = np.concatenate([sample.input_ids for sample in samples])[None]
        position_ids = np.concatenate([np.arange(length) for length in lengths])[None]
        attention_mask = None
    else:
        starts = np.arange(len(samples)) * width
        input_ids = _pad([sample.input_ids for sample in samples], width, pad_token_id)
        position_ids = np.tile(np.arange(width), (len(samples), 1))
        attention_mask = torch.from_numpy(_pad([np.ones(length, dtype=np.int64) for length in lengths], width, 0))

    longest = max(len(sample.labels) for sample in samples)
    hidden_index, targets, token_index = [], [], []
    for row, (sample, start) in enumerate(zip(samples, starts)):
        wanted = _wanted_tokens(sample, every_response_token)
        hidden_index.append(start + sample.prompt_len - 1 + wanted)
        targets.append(sample.input_ids[sample.prompt_len + wanted])
        token_index.append(row * longest + wanted)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64))

    prior = [np.zeros(len(sample.labels), dtype=np.float32) for sample in samples] if log_p is None else log_p
    return Batch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids),
        attention_mask=attention_mask,
        hidden_index=tensor(np.concatenate(hidden_index)),
        targets=tensor(np.concatenate(targets)),
        token_index=tensor(np.concatenate(token_index)),
        labels=tensor(_pad([sample.labels for sample in samples], longest, 0)),
        mask=tensor(_pad([sample.mask for sample in samples], longest, 0)),
        step_ids=tensor(_pad([sample.step_ids for sample in samples], longest, 0)),
        log_p=torch.from_numpy(_pad(prior, longest, 0.0)),
        answer_label=torch.tensor([sample.answer_label for sample in samples]),
    )


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
