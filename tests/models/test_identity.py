"""The key of the prior cache changes with the weights, and with nothing else."""

import json
import os
import shutil

import pytest
from tiny import make_model, save_adapter

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models import identity
from pipa_openrlhf.models.identity import weights_id


@pytest.fixture
def model(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "policy", folder)
    return folder


@pytest.fixture
def id_of(tmp_path):
    return lambda folder: weights_id(str(folder), str(tmp_path / "cache"))


def change_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_copy_is_the_same_model(model, id_of, tiny_models, tmp_path):
    assert id_of(model) == id_of(tiny_models / "policy") != id_of(tiny_models / "prior")
    os.symlink(model, tmp_path / "link")
    assert id_of(tmp_path / "link") == id_of(model)
    assert id_of(str(model) + "/") == id_of(model)


def test_one_byte_of_the_weights(model, id_of):
    before = id_of(model)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    stamp = weights.stat().st_mtime_ns
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp + 1, stamp + 1))
    assert id_of(model) != before


def test_config_that_changes_the_function(model, id_of):
    before = id_of(model)
    change_json(model / "config.json", transformers_version="9.9", use_cache=False, _name_or_path="elsewhere")
    assert id_of(model) == before
    change_json(model / "config.json", rms_norm_eps=0.5)
    assert id_of(model) != before


def test_other_files_do_not_matter(model, id_of):
    before = id_of(model)
    (model / "README.md").write_text("hello")
    (model / "value_head.safetensors").write_bytes(b"head")
    (model / "metrics.jsonl").write_text("{}")
    assert id_of(model) == before


def test_adapter_and_its_base(tiny_models, tmp_path, id_of):
    save_adapter(tiny_models / "policy", tmp_path / "one", 1)
    save_adapter(tiny_models / "policy", tmp_path / "two", 2)
    save_adapter(tiny_models / "prior", tmp_path / "other base", 1)
    ids = [id_of(tmp_path / name) for name in ("one", "two", "other base")]
    assert len({*ids, id_of(tiny_models / "policy")}) == 4
    before = ids[0]
    change_json(tmp_path / "one" / "adapter_config.json", inference_mode=False, peft_version="0")
    assert id_of(tmp_path / "one") == before
    change_json(tmp_path / "one" / "adapter_config.json", lora_alpha=99)
    assert id_of(tmp_path / "one") != before


def test_shards_of_one_model(tmp_path, id_of):
    big = make_model(0)
    big.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    files = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(files) > 1
    before = id_of(tmp_path / "sharded")
    make_model(1).save_pretrained(tmp_path / "other", max_shard_size="20KB")
    shutil.copy(tmp_path / "other" / files[-1].name, files[-1])
    assert id_of(tmp_path / "sharded") != before


def test_weights_are_hashed_once(model, id_of, monkeypatch):
    hashed = []
    real = identity.file_sha256
    monkeypatch.setattr(identity, "file_sha256", lambda path: hashed.append(path) or real(path))
    first = id_of(model)
    assert id_of(model) == first
    assert len(hashed) == 1
    os.utime(model / "model.safetensors")
    assert id_of(model) == first
    assert len(hashed) == 2


def test_damaged_memory_of_hashes_is_replaced(model, id_of, tmp_path):
    first = id_of(model)
    for text in ("", "{", "[]", '{"a": 1}'):
        (tmp_path / "cache" / "weight_hashes.json").write_text(text)
        assert id_of(model) == first


def test_folder_without_weights(model, id_of):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=str(model)):
        id_of(model)
