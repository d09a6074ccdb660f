"""Token log-probs of priors on disk, computed once for every (prior weights, token ids) and shared by all runs.

A prior has one folder. It holds shards, safetensors files of any number of entries, each written to a temporary name
and renamed when complete. An entry is one response: float32 log-probs [T], keyed by the sequence's token ids and the
length of its prompt. Labels, order, epochs, batch sizes, ranks, seeds and LoRA settings play no part in the key.
"""

import glob
import hashlib
import os
import uuid

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.errors import UserError

FORMAT_VERSION = 1
_KEY_BYTES = 16


def entry_key(sample: Sample) -> bytes:
    """Key of a sample's response within its prior's folder."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    digest.update(np.int64(sample.prompt_len).tobytes())
    digest.update(np.ascontiguousarray(sample.input_ids, dtype=np.int32).tobytes())
    return digest.digest()


class PriorCache:
    """The entries of one prior, memory-mapped.

    Args:
        cache_dir: root folder shared by all priors.
        prior_id: identity of the prior's weights, see ``models/identity.py``.
        dtype: name of the data type that the prior computes in.
    """

    def __init__(self, cache_dir: str, prior_id: str, dtype: str):
        self.folder = os.path.join(os.path.expanduser(cache_dir), f"v{FORMAT_VERSION}", f"{prior_id[:32]}-{dtype}")
        self._index: dict[bytes, tuple[np.ndarray, int, int]] = {}
        self._opened: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that appeared since the last look.

        Raises:
            UserError: a finished shard is damaged.
        """
        for path in sorted(glob.glob(os.path.join(self.folder, "*.safetensors"))):
            if path not in self._opened:
                self._open_shard(path)
                self._opened.add(path)

    def missing(self, samples: list[Sample]) -> np.ndarray:
        """[len(samples)] bool: True at the first sample of every key that has no entry."""
        seen: set[bytes] = set()
        absent = np.zeros(len(samples), dtype=bool)
        for position, sample in enumerate(samples):
            key = entry_key(sample)
            if key not in self._index and key not in seen:
                seen.add(key)
                absent[position] = True
        return absent

    def log_probs(self, sample: Sample) -> np.ndarray:
        """[T] float32 log-probs of the sample's response tokens.

        Raises:
            KeyError: no entry; the prior pass comes first.
        """
        values, start, end = self._index[entry_key(sample)]
        return values[start:end]

    def add(self, samples: list[Sample], log_probs: list[np.ndarray]) -> None:
        """Write one shard with an entry a sample and open it."""
        os.makedirs(self.folder, exist_ok=True)
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(map(entry_key, samples)), dtype=np.uint8).copy()),
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

    def _open_shard(self, path: str) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in ("keys", "starts", "log_probs")}
                recorded = shard.metadata()["checksum"]
            intact = recorded == _checksum(tensors)
        except (SafetensorError, KeyError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"{path} is damaged: delete it, and its log-probs are computed again")
        keys, starts, values = tensors["keys"].numpy().tobytes(), tensors["starts"].tolist(), tensors["log_probs"]
        for row, (start, end) in enumerate(zip(starts, starts[1:])):
            self._index[keys[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]] = (values.numpy(), start, end)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
