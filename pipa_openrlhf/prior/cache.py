"""Token log-probs of priors on disk, computed once for every (prior weights, token ids) and shared by all runs.

A prior has one folder. It holds shards, safetensors files of any number of entries, each written to a temporary name
and renamed when complete. An entry is one response: float32 log-probs [T], keyed by the sequence's token ids and the
length of its prompt. Labels, order, epochs, batch sizes, ranks, seeds and LoRA settings play no part in the key.

The folder's name says which weights as used gave the log-probs, so that it never has to change.
"""

import glob
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from typing import cast

import numpy as np
import peft.utils
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from pipa_openrlhf.data.samples import KEY_TYPE, Sample, Samples, sequence_key
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import adapter_base, is_adapter
from pipa_openrlhf.model.loading import only_from_disk, refuse_hub_adapter
from pipa_openrlhf.remembered import file_stamp, remembered

FORMAT_VERSION = 1

# Raised when this package computes other log-probs from the same weights and tokens than it did before.
NUMERICS_VERSION = 1

# What a config says about the software or the run that wrote it, not about the function the weights compute.
_INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
_INCIDENTAL_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"}
# In the order in which transformers and PEFT look for them.
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADAPTER_WEIGHTS = (peft.utils.SAFETENSORS_WEIGHTS_NAME, peft.utils.WEIGHTS_NAME)


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
        prior_id: identity of the prior, see :func:`prior_id`.
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


def prior_id(path: str, memory_dir: str) -> str:
    """Hex digest of everything that the log-probs of the model at ``path`` depend on, but for the data type.

    Versions of torch are left out: they compute the same function with other rounding.

    Raises:
        UserError: the folder holds no weights.
    """
    versions = f"{NUMERICS_VERSION} {transformers.__version__}"
    return hashlib.sha256(f"{weights_id(path, memory_dir)} {versions}".encode()).hexdigest()


def weights_id(path: str, memory_dir: str, revision: str | None = None) -> str:
    """Hex digest that changes whenever the weights, the adapter, the config or the code behind ``path`` change.

    Weight files are hashed once; the hash is remembered in ``memory_dir``. A model of the hub is identified by its
    commit.

    Args:
        revision: of a model of the hub; None: its newest.

    Raises:
        UserError: the folder holds no weights, or the hub no such model.
    """
    digest = hashlib.sha256()
    if is_adapter(path):
        base, base_revision = adapter_base(path)
        digest.update(weights_id(base, memory_dir, base_revision).encode())
        digest.update(_config_text(os.path.join(path, "adapter_config.json"), _INCIDENTAL_ADAPTER))
        files = _weight_files(path, _ADAPTER_WEIGHTS)
    elif os.path.isdir(path):
        digest.update(_config_text(os.path.join(path, "config.json"), _INCIDENTAL))
        files = _weight_files(path, _WEIGHTS)
        files += sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(path), "*.py"))))
    else:
        refuse_hub_adapter(path, revision)
        try:
            found = cached_file(path, "config.json", revision=revision, local_files_only=only_from_disk(path))
        except OSError as error:
            raise UserError(
                f"cannot find a model at {path}{f' ({revision})' if revision else ''}: {first_line(error)}"
            ) from error
        config = cast(str, found)  # None only where it is told not to raise
        commit = extract_commit_hash(config, None)
        if commit is None:
            return weights_id(os.path.dirname(config), memory_dir)
        return hashlib.sha256(f"{path}@{commit}".encode()).hexdigest()
    for name in files:
        digest.update(f"{name} {_remembered_hash(os.path.join(path, name), memory_dir)}".encode())
    return digest.hexdigest()


def file_sha256(path: str) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _weight_files(folder: str, names: tuple[str, ...]) -> list[str]:
    """Names of the files that loading would read: the first of ``names`` there is, and what it lists if an index."""
    found = next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)
    if found is None:
        raise UserError(f"{folder} holds no weights ({' or '.join(names)})")
    if not found.endswith(".index.json"):
        return [found]
    path = os.path.join(folder, found)
    try:
        with open(path) as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of weights: download it again") from error
    absent = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if absent:
        raise UserError(f"{path} lists {absent[0]}, which is not there: download it again")
    return [found, *shards]


def _remembered_hash(file: str, memory_dir: str) -> str:
    real = os.path.realpath(file)
    return remembered(
        real, file_stamp(real), os.path.join(memory_dir, "weight_hashes.json"), lambda: file_sha256(real)
    )


def _config_text(path: str, incidental: set[str]) -> bytes:
    try:
        with open(path) as file:
            config = dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a config of a model ({error}): download it again") from error
    kept = {name: value for name, value in config.items() if name not in incidental and value is not None}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return json.dumps(kept, sort_keys=True).encode()
