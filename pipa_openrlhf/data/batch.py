"""Samples to tensors: one micro-batch, padded, packed into one row, or in one row with shared prompts."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from pipa_openrlhf.data.tokenise import Sample


@dataclass(frozen=True)
class SharedRow:
    """What the L tokens of a row stand for, in which prompts are shared: B sequences, the longest of W tokens.

    Attributes:
        sequence_index: [B, W] place in the row of every token of every sequence, 0 where padded.
        row_index: [L] place in [B * W] where a token of the row occurs first.
        repeats: per sequence whose prompt occurred before: begin and end of that prompt in the row, and the place in
            [B * W] where its copy begins.
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


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences; T is its longest response. Response tensors are aligned with each other.

    Attributes:
        input_ids, position_ids: [B, L] right-padded, or [1, L] in one row; each sequence's positions from 0, an
            answer's from its prompt's end.
        attention_mask: [B, L], or None for one row: transformers sees from the positions what a packed row holds.
        hidden_index: [N] flat positions of the hidden states that predict the wanted response tokens.
        targets: [N] ids of those tokens.
        token_index: [N] their flat positions in [B * T].
        labels, mask, step_ids: [B, T], c_t, m_t and the step that a token belongs to.
        log_p: [B, T] float32 log-probs under the prior; zeros where the objective has none.
        answer_label: [B].
        weight: [B] float32, multiplies an answer's loss; a pair's is that of its chosen side.
        shared_row: what ``input_ids`` stand for where they share prompts.
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
    shared_row: SharedRow | None = None

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[N] values of the wanted tokens to [B, T], 0 at the others."""
        zeros = values.new_zeros(self.labels.numel())
        return zeros.index_copy(0, self.token_index, values).view(self.labels.shape)

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
    layout: str,
    every_response_token: bool = False,
    keep_last_token: bool = False,
) -> Batch:
    """Build a micro-batch. The last token of a sequence is a target only, as nothing is predicted from it.

    Args:
        samples: B of them.
        log_p: per sample [T_i] prior log-probs, or None.
        layout: ``padded``: a row a sequence; ``packed``: all sequences in one row, told apart by their positions;
            ``shared``: all in one row with each prompt once, laid out as separate sequences in attention alone.
        every_response_token: ask the model for all response tokens (the prior pass) rather than the labelled ones.
        keep_last_token: run it through the model all the same, for the balancing loss of experts.
    """
    sequences = [sample.input_ids if keep_last_token else sample.input_ids[:-1] for sample in samples]
    if layout == "shared" and len(samples) > 1:
        placed = _shared_layout(sequences, [sample.prompt_len for sample in samples], prompt_keys(samples))
    elif layout == "packed":
        placed = _packed_layout(sequences)
    else:
        placed = _padded_layout(sequences, pad_token_id)

    longest = max(len(sample.labels) for sample in samples)
    hidden_index, targets, token_index = [], [], []
    for row, (sample, places) in enumerate(zip(samples, placed.places)):
        wanted = _wanted_tokens(sample, every_response_token)
        hidden_index.append(places[sample.prompt_len - 1 + wanted])
        targets.append(sample.input_ids[sample.prompt_len + wanted])
        token_index.append(row * longest + wanted)

    prior = [np.zeros(len(sample.labels), dtype=np.float32) for sample in samples] if log_p is None else log_p
    return Batch(
        input_ids=_tensor(placed.input_ids),
        position_ids=_tensor(placed.position_ids),
        attention_mask=None if placed.attention_mask is None else _tensor(placed.attention_mask),
        hidden_index=_tensor(np.concatenate(hidden_index)),
        targets=_tensor(np.concatenate(targets)),
        token_index=_tensor(np.concatenate(token_index)),
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


def _shared_layout(sequences: list[np.ndarray], prompt_lens: list[int], keys: list[bytes | int]) -> _Layout:
    width = max(map(len, sequences))
    prompts: dict[bytes | int, np.ndarray] = {}
    row, positions, row_index, places, repeats = [], [], [], [], []
    used = 0
    for number, (ids, prompt_len, key) in enumerate(zip(sequences, prompt_lens, keys)):
        # A prompt that has its place already is left out of the row here.
        first = prompt_len if key in prompts else 0
        offsets = np.arange(first, len(ids))
        own = used + offsets - first
        used += len(own)
        prompt = prompts.setdefault(key, own[:prompt_len])
        if first:
            repeats.append((int(prompt[0]), int(prompt[0]) + prompt_len, number * width))
        places.append(np.concatenate([prompt, own]) if first else own)
        row.append(ids[first:])
        positions.append(offsets)
        row_index.append(number * width + offsets)
    return _Layout(
        input_ids=np.concatenate(row)[None],
        position_ids=np.concatenate(positions)[None],
        places=places,
        shared_row=SharedRow(_tensor(_pad(places, width, 0)), _tensor(np.concatenate(row_index)), tuple(repeats)),
    )


def prompt_keys(samples: list[Sample]) -> list[bytes | int]:
    """Per sample a key of its prompt's tokens, equal for equal prompts; of its own where there is no prompt."""
    return [
        sample.input_ids[: sample.prompt_len].tobytes() if sample.prompt_len else number
        for number, sample in enumerate(samples)
    ]


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
