"""Token log-probs of priors on disk, computed once for every (prior weights, token ids) and shared by all runs.

A prior has one folder. It holds shards, safetensors files of any number of entries, each written to a temporary name
and renamed when complete. An entry is one response: float32 log-probs [T], keyed by the sequence's token ids and the
length of its prompt. Labels, order, epochs, batch sizes, ranks, seeds and LoRA settings play no part in the key.
"""

import glob
import hashlib
import os
import uuid
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipa_openrlhf.data.samples import KEY_TYPE, Sample, Samples, sequence_key
from pipa_openrlhf.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Shard:
    """Memory-mapped: keys [n], starts [n + 1] of entries in ``log_probs``."""

    keys: np.ndarray
    starts: np.ndarray
    log_probs: np.ndarray


class PriorCache:
    """The entries of one prior, memory-mapped.

    Args:
        cache_dir: root folder shared by all priors.
        prior_id: identity of the prior, see ``prior/key.py``.
        dtype: name of the data type that the prior computes in.
    """

    def __init__(self, cache_dir: str, prior_id: str, dtype: str):
        self.folder = os.path.join(os.path.expanduser(cache_dir), f"v{FORMAT_VERSION}", f"{prior_id[:32]}-{dtype}")
        self._paths: list[str] = []
        self._shards: list[_Shard] = []
        # The keys of all shards, sorted, and where their entries are; a dict would take many times the memory.
        self._keys = np.zeros(0, dtype=KEY_TYPE)
        self._shard_of = self._row_of = np.zeros(0, dtype=np.int32)
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that appeared since the last look.

        Raises:
            UserError: a finished shard is damaged, or holds values that are not finite.
        """
        new = sorted(set(glob.glob(os.path.join(self.folder, "*.safetensors"))) - set(self._paths))
        if not new:
            return
        self._shards += [_open_shard(path) for path in new]
        self._paths += new
        sizes = [len(shard.keys) for shard in self._shards]
        keys = np.concatenate([shard.keys for shard in self._shards])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._row_of = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]

    def missing(self, samples: Samples) -> np.ndarray:
        """[len(samples)] bool: True at the first sample of every key that has no entry."""
        keys = samples.column("sequence_key")
        first = np.zeros(len(samples), dtype=bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return first & ~self._find(keys)[1]

    def log_probs(self, sample: Sample) -> np.ndarray:
        """[T] float32 log-probs of the sample's response tokens.

        Raises:
            KeyError: no entry; the prior pass comes first.
        """
        (place,), (found,) = self._find(_keys([sample]))
        if not found:
            raise KeyError(sample.where)
        shard, row = self._shards[self._shard_of[place]], self._row_of[place]
        return shard.log_probs[shard.starts[row] : shard.starts[row + 1]]

    def add(self, samples: list[Sample], log_probs: list[np.ndarray]) -> None:
        """Write one shard with an entry a sample and open it.

        Raises:
            UserError: a log-prob is NaN or infinite; nothing is written.
            OSError: the folder cannot be written to, or the disk is full.
        """
        for sample, values in zip(samples, log_probs):
            if not np.isfinite(values).all():
                token = int(np.flatnonzero(~np.isfinite(values))[0])
                raise UserError(
                    f"{sample.where}: the prior gives response token {token + 1} the log-prob {values[token]}: "
                    "try --ds.param_dtype fp32, or another prior"
                )
        os.makedirs(self.folder, exist_ok=True)
        tensors = {
            "keys": torch.from_numpy(_keys(samples).view(np.uint8)),
            "starts": torch.from_numpy(np.cumsum([0] + [len(values) for values in log_probs])),
            "log_probs": torch.from_numpy(np.concatenate(log_probs).astype(np.float32)),
        }
        path = os.path.join(self.folder, f"{uuid.uuid4().hex}.safetensors")
        unfinished = path + ".unfinished"
        try:
            save_file(tensors, unfinished, metadata={"checksum": _checksum(tensors)})
            os.replace(unfinished, path)
        except SafetensorError as error:
            # One rank alone may meet this; an OSError is reported by the rank that has it.
            raise OSError(f"cannot write the prior cache {path}: {error}") from error
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)
        self.refresh()

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per key its place among the sorted ones, and whether it is there at all."""
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=bool)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return places, self._keys[places] == keys


def _keys(samples: list[Sample]) -> np.ndarray:
    return np.array([sequence_key(sample) for sample in samples], dtype=KEY_TYPE)


def _open_shard(path: str) -> _Shard:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("keys", "starts", "log_probs")}
            recorded = file.metadata()["checksum"]
        intact = recorded == _checksum(tensors)
    except (SafetensorError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: delete it, and its log-probs are computed again")
    if not tensors["log_probs"].isfinite().all():
        raise UserError(f"{path} holds log-probs that are NaN or infinite: delete it, and they are computed again")
    return _Shard(tensors["keys"].numpy().view(KEY_TYPE), tensors["starts"].numpy(), tensors["log_probs"].numpy())


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
