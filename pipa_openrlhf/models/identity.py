"""Identity of a model's weights as used, for the key of the prior cache."""

import glob
import hashlib
import json
import os

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models.loading import adapter_base, is_adapter, only_from_disk

# What a config says about the software or the run that wrote it, not about the function the weights compute.
_INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
_INCIDENTAL_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"}


def weights_id(path: str, cache_dir: str) -> str:
    """Hex digest that changes whenever the weights, the adapter, or the config behind ``path`` change.

    Weight files are hashed once; the hash is remembered in ``cache_dir`` by path, size and modification time. A model
    of the hub is identified by its commit.

    Raises:
        UserError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    if is_adapter(path):
        digest.update(weights_id(adapter_base(path), cache_dir).encode())
        digest.update(_config_text(os.path.join(path, "adapter_config.json"), _INCIDENTAL_ADAPTER))
        patterns = ("adapter_model*.safetensors", "adapter_model*.bin")
    elif os.path.isdir(path):
        digest.update(_config_text(os.path.join(path, "config.json"), _INCIDENTAL))
        patterns = ("model*.safetensors", "pytorch_model*.bin")
    else:
        config = cached_file(path, "config.json", local_files_only=only_from_disk(path))
        commit = extract_commit_hash(config, None)
        if commit is None:
            return weights_id(os.path.dirname(config), cache_dir)
        return hashlib.sha256(f"{path}@{commit}".encode()).hexdigest()
    for name, file_hash in _weight_hashes(path, patterns, cache_dir):
        digest.update(f"{name} {file_hash}".encode())
    return digest.hexdigest()


def file_sha256(path: str) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _weight_hashes(folder: str, patterns: tuple[str, ...], cache_dir: str) -> list[tuple[str, str]]:
    for pattern in patterns:
        files = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
        if files:
            return [(os.path.basename(file), _remembered_hash(file, cache_dir)) for file in files]
    raise UserError(f"{folder} holds no weights ({' or '.join(patterns)})")


def _remembered_hash(file: str, cache_dir: str) -> str:
    memory_path = os.path.join(os.path.expanduser(cache_dir), "weight_hashes.json")
    try:
        with open(memory_path) as memory_file:
            memory = json.load(memory_file)
    except (FileNotFoundError, json.JSONDecodeError):
        memory = {}
    if not isinstance(memory, dict):
        memory = {}
    real = os.path.realpath(file)
    status = os.stat(real)
    stamp = [status.st_size, status.st_mtime_ns]
    if memory.get(real, [None, None])[0] != stamp:
        memory[real] = [stamp, file_sha256(real)]
        os.makedirs(os.path.dirname(memory_path), exist_ok=True)
        unfinished = f"{memory_path}.{os.getpid()}"
        with open(unfinished, "w") as memory_file:
            json.dump(memory, memory_file)
        os.replace(unfinished, memory_path)
    return memory[real][1]


def _config_text(path: str, incidental: set[str]) -> bytes:
    with open(path) as file:
        config = json.load(file)
    kept = {name: value for name, value in config.items() if name not in incidental and value is not None}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return json.dumps(kept, sort_keys=True).encode()
