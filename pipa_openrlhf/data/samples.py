"""Samples as columns: flat arrays in memory or in files, from which a Sample is made when it is asked for.

Everything that looks at all samples at once (lengths, pairs, plans, keys) takes a column; no process holds a Python
object a sample.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np

KEY_TYPE = "S16"
# Fields of a Sample, by the number of values they have: one a token, one a response token, one.
TOKENS: dict[str, type] = {"input_ids": np.int32}
RESPONSE: dict[str, type] = {"labels": np.int8, "mask": np.int8, "step_ids": np.int32}
NUMBERS: dict[str, type] = {"prompt_len": np.int32, "answer_label": np.int8, "weight": np.float64}
# Made from them, one a sample: see `pack`. A pair_id of -1 is None; `problem` numbers the texts of `problem_id`;
# `later_loss_tokens` are those in the mask but for the first response token.
_DERIVED: dict[str, Any] = {
    **{"length": np.int32, "pair_id": np.int64, "problem": np.int64},
    **{"loss_tokens": np.int32, "later_loss_tokens": np.int32, "right_tokens": np.int32},
    **{"sequence_key": KEY_TYPE, "prompt_key": np.uint64, "digest": KEY_TYPE},
}
# Text as UTF-8, and the bytes of each.
_TEXTS: dict[str, Any] = {
    **{"where": np.uint8, "where_size": np.int32},
    **{"problem_id": np.uint8, "problem_id_size": np.int32},
}
_DISTINCT: dict[str, Any] = {"token_ids": np.int32}
_ALL = {**TOKENS, **RESPONSE, **NUMBERS, **_DERIVED, **_TEXTS, **_DISTINCT}
TYPES = {name: np.dtype(kind) for name, kind in _ALL.items()}


@dataclass(frozen=True)
class Sample:
    """One tokenised record; T response tokens, the last of them eos where the answer is complete.

    Attributes:
        input_ids: int32 [prompt_len + T].
        labels: int8 [T], c_t.
        mask: int8 [T], m_t: 0 on text the model did not write, on steps without a label, and on a first token that
            nothing precedes.
        step_ids: int32 [T], step of each response token; eos is of the last step.
        weight: multiplies its loss.
    """

    input_ids: np.ndarray
    prompt_len: int
    labels: np.ndarray
    mask: np.ndarray
    step_ids: np.ndarray
    answer_label: int
    problem_id: str
    pair_id: int | None
    where: str
    weight: float = 1.0


class Samples(Sequence[Sample]):
    """A list of samples that are made one by one; a slice or an array of indices gives some of them."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """[len] one of the numbers of each sample, by its name in ``TYPES``."""

    @abstractmethod
    def one(self, index: int) -> Sample:
        """The sample at ``index``, from 0."""

    @abstractmethod
    def tokens(self, index: int) -> np.ndarray:
        """``input_ids`` of the sample at ``index``, from 0."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "Samples": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        return self.select(index) if isinstance(index, np.ndarray) else self.one(range(len(self))[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self.one, range(len(self)))

    def select(self, rows: np.ndarray, pair_ids: np.ndarray | None = None) -> "Samples":
        """The samples at ``rows``, in that order, with other pairs where they are given."""
        return Selection(self, rows, pair_ids)

    @abstractmethod
    def token_ids(self) -> np.ndarray:
        """Distinct ids of the tokens of the data sets that these samples are from."""

    def problem_id(self, number: int) -> str:
        """The text that a number of the column ``problem`` stands for."""
        raise NotImplementedError


class Columns(Samples):
    """All samples of a data set.

    Args:
        arrays: by the names in ``TYPES``.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays["length"])

    def column(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def one(self, index: int) -> Sample:
        arrays = self._arrays
        tokens, response = (slice(*starts[index : index + 2]) for starts in (self._starts, self._response_starts))
        pair_id = int(arrays["pair_id"][index])
        values: dict[str, Any] = {
            **{name: arrays[name][tokens] for name in TOKENS},
            **{name: arrays[name][response] for name in RESPONSE},
            **{name: arrays[name][index].item() for name in NUMBERS},
        }
        return Sample(
            **values,
            problem_id=self.problem_id(int(arrays["problem"][index])),
            pair_id=None if pair_id < 0 else pair_id,
            where=self._text("where", self._where_starts, index),
        )

    def tokens(self, index: int) -> np.ndarray:
        return self._arrays["input_ids"][slice(*self._starts[index : index + 2])]

    def token_ids(self) -> np.ndarray:
        return self._arrays["token_ids"]

    def problem_id(self, number: int) -> str:
        return self._text("problem_id", self._problem_starts, number)

    def _text(self, name: str, starts: np.ndarray, index: int) -> str:
        return self._arrays[name][slice(*starts[index : index + 2])].tobytes().decode()

    @cached_property
    def _starts(self) -> np.ndarray:
        return _starts(self._arrays["length"])

    @cached_property
    def _response_starts(self) -> np.ndarray:
        return _starts(self._arrays["length"] - self._arrays["prompt_len"])

    @cached_property
    def _where_starts(self) -> np.ndarray:
        return _starts(self._arrays["where_size"])

    @cached_property
    def _problem_starts(self) -> np.ndarray:
        return _starts(self._arrays["problem_id_size"])


def _starts(sizes: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


class Selection(Samples):
    """Some samples of others, in an order of its own."""

    def __init__(self, samples: Samples, rows: np.ndarray, pair_ids: np.ndarray | None = None):
        self._samples, self._rows, self._pair_ids = samples, rows, pair_ids

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> np.ndarray:
        if name == "pair_id" and self._pair_ids is not None:
            return self._pair_ids
        return self._samples.column(name)[self._rows]

    def one(self, index: int) -> Sample:
        sample = self._samples.one(int(self._rows[index]))
        return sample if self._pair_ids is None else replace(sample, pair_id=int(self._pair_ids[index]))

    def tokens(self, index: int) -> np.ndarray:
        return self._samples.tokens(int(self._rows[index]))

    def select(self, rows: np.ndarray, pair_ids: np.ndarray | None = None) -> Samples:
        if pair_ids is None and self._pair_ids is not None:
            pair_ids = self._pair_ids[rows]
        return Selection(self._samples, self._rows[rows], pair_ids)

    def token_ids(self) -> np.ndarray:
        return self._samples.token_ids()

    def problem_id(self, number: int) -> str:
        return self._samples.problem_id(number)


class Joined(Samples):
    """Several lists of samples, one after another."""

    def __init__(self, parts: Sequence[Samples]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([part.column(name) for part in self._parts])

    def token_ids(self) -> np.ndarray:
        return np.unique(np.concatenate([part.token_ids() for part in self._parts]))

    def one(self, index: int) -> Sample:
        part, inside = self._place(index)
        return part.one(inside)

    def tokens(self, index: int) -> np.ndarray:
        part, inside = self._place(index)
        return part.tokens(inside)

    def _place(self, index: int) -> tuple[Samples, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, index - int(self._ends[number]) + len(part)


def as_samples(samples: Sequence[Sample]) -> Samples:
    """Plain samples in columns; those that are in columns stay as they are."""
    return samples if isinstance(samples, Samples) else Columns(Gathered([pack(samples)]).arrays())


def pack(samples: Sequence[Sample]) -> dict[str, np.ndarray | list[str]]:
    """Columns of samples, and their problems' texts, one a sample, as ``problem_id``."""
    places = [one.where.encode() for one in samples]
    keys = [sequence_key(one) for one in samples]
    columns: dict[str, Any] = {
        **{name: _flat(name, [getattr(one, name) for one in samples]) for name in (*TOKENS, *RESPONSE)},
        **{name: [getattr(one, name) for one in samples] for name in NUMBERS},
        "length": [len(one.input_ids) for one in samples],
        "pair_id": [-1 if one.pair_id is None else one.pair_id for one in samples],
        "loss_tokens": [np.count_nonzero(one.mask) for one in samples],
        "later_loss_tokens": [np.count_nonzero(one.mask[1:]) for one in samples],
        "right_tokens": [np.count_nonzero(one.labels * one.mask) for one in samples],
        "sequence_key": keys,
        "prompt_key": [_prompt_key(one) for one in samples],
        "digest": [_digest(one, key) for one, key in zip(samples, keys)],
        "where": np.frombuffer(b"".join(places), dtype=np.uint8),
        "where_size": list(map(len, places)),
    }
    arrays = {name: np.asarray(values, dtype=TYPES[name]) for name, values in columns.items()}
    return {**arrays, "problem_id": [one.problem_id for one in samples]}


def _flat(name: str, rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0, dtype=TYPES[name])


def sequence_key(sample: Sample) -> bytes:
    """Tells apart sequences of tokens and the ends of their prompts."""
    digest = hashlib.blake2b(np.int64(sample.prompt_len).tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(sample.input_ids, dtype=np.int32).tobytes())
    return digest.digest()


def _prompt_key(sample: Sample) -> int:
    """The same where prompts are the same tokens; 0 without a prompt."""
    if not sample.prompt_len:
        return 0
    prompt = np.ascontiguousarray(sample.input_ids[: sample.prompt_len], dtype=np.int32)
    return int.from_bytes(hashlib.blake2b(prompt.tobytes(), digest_size=8).digest(), "little")


def _digest(sample: Sample, key: bytes) -> bytes:
    """Of everything that a loss may take from a sample."""
    digest = hashlib.blake2b(key, digest_size=16)
    digest.update(repr([getattr(sample, name) for name in NUMBERS]).encode())
    for name in RESPONSE:
        digest.update(np.ascontiguousarray(getattr(sample, name), dtype=TYPES[name]).tobytes())
    return digest.digest()


def is_intact(sample: Sample, digest: bytes) -> bool:
    """Whether a stored sample is the one that its column ``digest`` was made from."""
    return _digest(sample, sequence_key(sample)).rstrip(b"\0") == digest.rstrip(b"\0")


class Gathered:
    """Puts packed samples one after another, and numbers their problems in the order in which they appear.

    Args:
        packed: the first.
    """

    def __init__(self, packed: Sequence[dict] = ()):
        self._numbers: dict[bytes, int] = {}
        self._known = 0
        self._has_token = np.zeros(0, dtype=np.bool_)
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in TYPES}
        for one in packed:
            self.add(one)

    def add(self, packed: dict[str, Any]) -> None:
        """Append samples."""
        numbers, new = np.empty(len(packed["problem_id"]), dtype=np.int64), []
        for index, text in enumerate(map(str.encode, packed["problem_id"])):
            # Texts may be long, and there may be a million.
            key = hashlib.blake2b(text, digest_size=16).digest()
            numbers[index] = number = self._numbers.setdefault(key, len(self._numbers))
            if number == self._known:
                new.append(text)
                self._known += 1
        texts = np.frombuffer(b"".join(new), dtype=np.uint8)
        sizes = np.array(list(map(len, new)), dtype=np.int32)
        for name, array in {**packed, "problem": numbers, "problem_id": texts, "problem_id_size": sizes}.items():
            self.append(name, array)
        ids = packed["input_ids"]
        missing = int(ids.max(initial=-1)) + 1 - len(self._has_token)
        self._has_token = np.pad(self._has_token, (0, max(missing, 0)))
        self._has_token[ids] = True

    def close(self) -> None:
        """Append what is known when there is nothing more to add."""
        self.append("token_ids", np.flatnonzero(self._has_token).astype(np.int32))

    def append(self, name: str, array: np.ndarray) -> None:
        """Put values at the end of a column."""
        self._arrays[name].append(array)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by the names in ``TYPES``."""
        self.close()
        return {name: np.concatenate([np.zeros(0, TYPES[name]), *parts]) for name, parts in self._arrays.items()}
