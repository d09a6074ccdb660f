"""The key of the prior cache changes with the weights, and with nothing else."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, save_adapter

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer
from pipa_openrlhf.prior import cache as identity
from pipa_openrlhf.prior.cache import prior_id, weights_id


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


def test_weights_replaced_with_equal_size_and_time(model, id_of, tiny_models):
    """As `cp -p`, rsync and tar leave them: a rename keeps the times of the new file, writing in place can restore
    the time of modification."""
    before = id_of(model)
    weights, other = model / "model.safetensors", tiny_models / "prior" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert other.stat().st_size == weights.stat().st_size
    original = weights.read_bytes()
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(stamp, stamp))
    assert id_of(model) != before
    weights.with_suffix(".new").write_bytes(original)
    os.utime(weights.with_suffix(".new"), ns=(stamp, stamp))
    os.replace(weights.with_suffix(".new"), weights)
    assert id_of(model) == before


def test_code_in_the_folder(model, id_of):
    before = id_of(model)
    (model / "modeling_custom.py").write_text("SCALE = 1\n")
    with_code = id_of(model)
    assert with_code != before
    (model / "modeling_custom.py").write_text("SCALE = 2\n")
    assert id_of(model) not in (before, with_code)


@pytest.fixture
def indexed(model):
    """The model in two shards of arbitrary names, which only the index knows."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    shards = {"first half.safetensors": names[::2], "b/second.safetensors": names[1::2]}
    (model / "b").mkdir()
    for file, some in shards.items():
        save_file({name: tensors[name] for name in some}, model / file, metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_shards_that_only_an_index_names(indexed, id_of):
    before = id_of(indexed)
    for file in ("first half.safetensors", "b/second.safetensors"):
        content = bytearray((indexed / file).read_bytes())
        content[-1] ^= 1
        (indexed / file).write_bytes(content)
        now = id_of(indexed)
        assert now != before
        before = now


def test_stale_files_beside_the_index_do_not_matter(indexed, id_of, tiny_models):
    before = id_of(indexed)
    for name in ("model-00001-of-00009.safetensors", "pytorch_model.bin", "model_old.safetensors"):
        shutil.copy(tiny_models / "prior" / "model.safetensors", indexed / name)
    assert id_of(indexed) == before


def test_index_that_cannot_be_followed_is_one_line(indexed, id_of):
    index = indexed / "model.safetensors.index.json"
    for text in ("", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match="model.safetensors.index.json"):
            id_of(indexed)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match="gone.safetensors"):
        id_of(indexed)


def test_prior_changes_with_what_computes_it(model, tmp_path, monkeypatch):
    def id_now() -> str:
        return prior_id(str(model), str(tmp_path / "cache"))

    before = id_now()
    assert id_now() == before
    monkeypatch.setattr(identity, "NUMERICS_VERSION", identity.NUMERICS_VERSION + 1)
    other_arithmetic = id_now()
    monkeypatch.setattr(identity.transformers, "__version__", "99.0")
    assert len({before, other_arithmetic, id_now()}) == 3


def test_memory_that_cannot_be_written_only_costs_time(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert weights_id(str(model), str(tmp_path / "file" / "cache")) == weights_id(str(model), str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_models):
    """A hub's local cache with ``org/base``: branch ``main`` is the policy, tag ``v1`` the prior."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--base"
    (repo / "refs").mkdir(parents=True)
    for revision, name in (("main", "policy"), ("v1", "prior")):
        commit = name.encode().hex().ljust(40, "0")
        (repo / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_models / name, repo / "snapshots" / commit)
    return "org/base"


def test_revision_of_an_adapters_base(hub, tiny_models, tmp_path, id_of):
    adapter = tmp_path / "adapter"
    save_adapter(tiny_models / "policy", adapter, 1)
    ids, weights = [], []
    for revision in (None, "main", "v1"):
        change_json(adapter / "adapter_config.json", base_model_name_or_path=hub, revision=revision)
        ids.append(id_of(adapter))
        loaded = load_causal_lm(str(adapter), torch.float32, "sdpa")
        weights.append(loaded.model.embed_tokens.weight.detach())
    assert ids[0] == ids[1] != ids[2]
    bases = [load_file(tiny_models / name / "model.safetensors") for name in ("policy", "policy", "prior")]
    for found, base in zip(weights, bases):
        assert torch.equal(found, base["model.embed_tokens.weight"])


def test_an_adapter_of_the_hub_is_refused_with_what_to_do(hub, tiny_models, tmp_path):
    """Also where its repository holds a config.json, with which transformers would load it unmerged."""
    snapshot = tmp_path / "hub" / "models--org--tuned" / "snapshots" / ("a" * 40)
    save_adapter(tiny_models / "policy", snapshot, 1)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    for _ in range(2):
        for use in (
            lambda: weights_id("org/tuned", str(tmp_path / "cache")),
            lambda: load_causal_lm("org/tuned", torch.float32, "sdpa"),
            lambda: load_tokenizer("org/tuned"),
        ):
            with pytest.raises(UserError, match="^org/tuned on the hub is an adapter: download it, `hf download org/"):
                use()
        shutil.copy(tiny_models / "policy" / "config.json", snapshot)
