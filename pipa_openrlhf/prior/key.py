"""Identity of a model's weights as used, of the log-probs that they give, and of each answer that they score."""

import glob
import hashlib
import json
import os
from typing import cast

import peft.utils
import transformers
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import adapter_base, is_adapter
from pipa_openrlhf.model.loading import only_from_disk
from pipa_openrlhf.remembered import file_stamp, remembered

# Raised when this package computes other log-probs from the same weights and tokens than it did before.
NUMERICS_VERSION = 1

# What a config says about the software or the run that wrote it, not about the function the weights compute.
_INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
_INCIDENTAL_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"}
# In the order in which transformers and PEFT look for them.
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADAPTER_WEIGHTS = (peft.utils.SAFETENSORS_WEIGHTS_NAME, peft.utils.WEIGHTS_NAME)


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
