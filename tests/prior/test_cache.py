"""Cached log-probs of the prior: found again when they are the same, never when they are not."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import random_samples
from tiny import read_jsonl, run_in_process, train, write_jsonl

from pipa_openrlhf import lag
from pipa_openrlhf.data.samples import as_samples, sequence_key
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.prior.cache import PriorCache
from pipa_openrlhf.prior.fill import fill_cache

SAMPLES = random_samples([(3, 4), (2, 7), (0, 5), (4, 1)], 50)


def values_of(samples) -> list[np.ndarray]:
    return [np.linspace(-len(one.labels), -1, len(one.labels), dtype=np.float32) for one in samples]


def filled(folder, samples=SAMPLES) -> PriorCache:
    cache = PriorCache(str(folder), "a" * 64, "fp32")
    cache.add(samples, values_of(samples))
    return cache


def shards(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.safetensors"))


def test_entries_are_found_again(tmp_path):
    filled(tmp_path)
    again = PriorCache(str(tmp_path), "a" * 64, "fp32")
    assert not again.missing(as_samples(SAMPLES)).any()
    for sample, values in zip(SAMPLES, values_of(SAMPLES)):
        found = again.log_probs(sample)
        assert found.dtype == np.float32 and np.array_equal(found, values)


def test_other_tokens_or_another_span_are_missing_once_a_key(tmp_path):
    cache = filled(tmp_path)
    other = replace(SAMPLES[0], input_ids=SAMPLES[0].input_ids + 1)
    five = {name: np.zeros(5, dtype=np.int8) for name in ("labels", "mask", "step_ids")}
    shifted = replace(SAMPLES[0], prompt_len=2, **five)
    assert cache.missing(as_samples([SAMPLES[0], other, shifted, other])).tolist() == [False, True, True, False]
    with pytest.raises(KeyError):
        cache.log_probs(other)


def test_key_ignores_everything_but_tokens_and_span():
    sample = SAMPLES[0]
    same = replace(
        sample, labels=1 - sample.labels, mask=0 * sample.mask, answer_label=1, problem_id="x", pair_id=3, where="?"
    )
    assert sequence_key(same) == sequence_key(sample)
    assert sequence_key(replace(sample, input_ids=sample.input_ids.astype(np.int64))) == sequence_key(sample)


def test_priors_and_dtypes_have_their_own_entries(tmp_path):
    filled(tmp_path)
    for prior, dtype in (("b" * 64, "fp32"), ("a" * 64, "bf16")):
        other = PriorCache(str(tmp_path), prior, dtype)
        assert other.missing(as_samples(SAMPLES)).all()
        other.add(SAMPLES[:1], [np.zeros(4, dtype=np.float32)])
    assert PriorCache(str(tmp_path), "a" * 64, "fp32").log_probs(SAMPLES[0])[0] == -4


def test_another_process_sees_new_shards_after_a_refresh(tmp_path):
    early = PriorCache(str(tmp_path), "a" * 64, "fp32")
    filled(tmp_path)
    assert early.missing(as_samples(SAMPLES)).all()
    early.refresh()
    assert not early.missing(as_samples(SAMPLES)).any()


class FirstOfTwo:
    """Rank 0 of two, when the other one has ended its part."""

    world_size = 2

    def get_rank(self) -> int:
        return 0

    def barrier(self) -> None: ...

    def all_reduce(self, tensor, op):
        return tensor


@pytest.mark.parametrize("after", [0.7, None])
def test_a_pass_waits_for_the_shard_of_another_rank(tmp_path, monkeypatch, after):
    """A file server shows it late, or never."""
    monkeypatch.setattr(lag, "LAG", 60 if after else 0.3)
    samples = as_samples(SAMPLES)
    filled(tmp_path / "other", SAMPLES[2:])
    (shard,) = (tmp_path / "other").rglob("*.safetensors")
    cache = PriorCache(str(tmp_path / "cache"), "a" * 64, "fp32")
    os.makedirs(cache.folder)
    if after:
        late = threading.Timer(after, os.rename, (shard, f"{cache.folder}/{shard.name}"))
        late.start()
    arguments = (
        cache,
        samples,
        lambda batch: -torch.ones(2, 9),
        FirstOfTwo(),
        0,
        [np.array([0, 1]), np.array([2, 3])],
    )
    if after is None:
        with pytest.raises(UserError, match="^--prior.cache_dir must be one folder that every node sees"):
            fill_cache(*arguments, "padded")
        return
    fill_cache(*arguments, "padded")
    late.join()
    assert not cache.missing(samples).any()


@pytest.mark.parametrize("damage", ["truncate", "flip a value", "flip a key", "empty", "text"])
def test_damaged_shard_is_an_error_that_names_it(tmp_path, damage):
    filled(tmp_path)
    (path,) = shards(tmp_path)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if damage == "truncate":
        content = content[:-3]
    elif damage.startswith("flip"):
        content[-3 if damage == "flip a value" else content.index(sequence_key(SAMPLES[0]))] ^= 1
    else:
        content = bytearray(b"" if damage == "empty" else b"not a shard")
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(UserError, match=path):
        PriorCache(str(tmp_path), "a" * 64, "fp32")


def test_unfinished_shard_is_ignored(tmp_path):
    filled(tmp_path)
    (path,) = shards(tmp_path)
    os.rename(path, path + ".unfinished")
    assert PriorCache(str(tmp_path), "a" * 64, "fp32").missing(as_samples(SAMPLES)).all()


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from pipa_openrlhf.prior import cache as prior_cache

    def fail(tensors, path, metadata):
        open(path, "wb").close()
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(prior_cache, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_values_stay_on_disk(tmp_path):
    """Opening a large shard maps it; only what is asked for is copied."""
    (long,) = random_samples([(1, 4_000_000)], 50)
    filled(tmp_path, [long])
    (path,) = shards(tmp_path)
    cache = PriorCache(str(tmp_path), "a" * 64, "fp32")
    assert cache.log_probs(long).base is not None
    with open("/proc/self/maps") as maps:
        assert any(path in line for line in maps)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_stored(tmp_path, value):
    cache = PriorCache(str(tmp_path), "a" * 64, "fp32")
    values = values_of(SAMPLES)
    values[1][2] = value
    with pytest.raises(UserError, match="^sample 1: .* response token 3 "):
        cache.add(SAMPLES, values)
    assert shards(tmp_path) == [] and cache.missing(as_samples(SAMPLES)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_shard_with_values_that_are_not_finite_is_an_error_that_names_it(tmp_path, monkeypatch, value):
    """As earlier versions stored them, with a checksum that holds."""
    values = values_of(SAMPLES)
    values[2][0] = value
    with monkeypatch.context() as patch:
        patch.setattr("numpy.isfinite", lambda some: np.ones_like(some, dtype=bool))
        with pytest.raises(UserError):
            PriorCache(str(tmp_path), "a" * 64, "fp32").add(SAMPLES, values)
    (path,) = shards(tmp_path)
    with pytest.raises(UserError, match=path):
        PriorCache(str(tmp_path), "a" * 64, "fp32")


# Through the command line.


def hits_and_misses(text: str) -> list[tuple[int, int]]:
    lines = [line for line in text.splitlines() if line.startswith("Prior cache: ")]
    return [(int(line.split()[2]), int(line.split()[4])) for line in lines]


def test_shards_overlap_and_keys_may_end_in_zeros(tmp_path, monkeypatch):
    """Sorted fixed-width keys: a trailing zero byte is part of a key, and the same entry may be in two shards."""
    keys = iter([b"\0" * 16, b"a" + b"\0" * 15, b"a" * 15 + b"\0", b"a" * 16])
    of = {sample.where: next(keys) for sample in SAMPLES}
    for module in ("prior.cache", "data.samples"):
        monkeypatch.setattr(f"pipa_openrlhf.{module}.sequence_key", lambda sample: of[sample.where])
    cache = filled(tmp_path, SAMPLES[:1])
    assert cache.missing(as_samples(SAMPLES)).tolist() == [False, True, True, True]
    cache.add(SAMPLES[::-1], values_of(SAMPLES[::-1]))
    again = PriorCache(str(tmp_path), "a" * 64, "fp32")
    for sample, values in zip(SAMPLES, values_of(SAMPLES)):
        assert np.array_equal(again.log_probs(sample), values)


def test_fifty_million_tokens_fit_in_250_megabytes(tmp_path):
    """Scaled down a hundred times, answers of 150 tokens."""
    samples = random_samples([(1, 150)] * 3400, 50)
    filled(tmp_path, samples)
    assert sum(os.path.getsize(path) for path in shards(tmp_path)) <= 2.5e6


def test_a_grid_of_runs_pays_once(small_run, capsys):
    """Learning rate, LoRA, seed, objective, labels, batch size, packing and stage do not matter."""
    grid = [
        {},
        {"adam.lr": 5e-7},
        {"ds.lora.rank": 4},
        {"ds.lora.rank": 2, "train.seed": 1},
        {"pipa.variant": "m", "data.annotation": "answer"},
        {"train.batch_size": 2, "train.micro_batch_size": 1, "ds.packing_samples": True, "ds.zero_stage": 3},
        {"data.max_samples": 6},
    ]
    for shared in ({}, {"prior.model_name_or_path": None}):
        capsys.readouterr()
        for number, changes in enumerate(grid):
            train(
                "train_pipa", *small_run(f"{len(shared)}-{number}", **{**shared, **changes, "ckpt.save_steps": None})
            )
        first, *others = hits_and_misses(capsys.readouterr().out)
        assert first == (0, 10)
        assert others == [(10, 0)] * 5 + [(6, 0)]


def test_new_data_and_another_dtype_are_added(small_run, tmp_path, capsys):
    rows = [{"prompt": "new ", "completion": text, "label": True} for text in ("a", "b", "a")]
    data = {"data.dataset": write_jsonl(tmp_path / "new.jsonl", rows), "data.annotation": None}
    train("train_pipa", *small_run("a"))
    train("train_pipa", *small_run("b", **data))
    train("train_pipa", *small_run("c", **{"ds.param_dtype": "bf16"}))
    train("train_pipa", *small_run("d", **{"eval.dataset": data["data.dataset"], "data.annotation": None}))
    misses = [misses for _, misses in hits_and_misses(capsys.readouterr().out)]
    assert misses == [10, 2, 10, 0]


def test_cached_values_are_those_of_the_prior(small_run, tmp_path):
    """The second run reads what the first one computed, with the same loss to the last bit."""
    first, second = (train("train_pipa", *small_run(name))[0] for name in ("a", "b"))
    assert first["loss"] == second["loss"] and first["logratio/chosen"] == second["logratio/chosen"] != 0
    same = train("train_pipa", *small_run("c", **{"prior.model_name_or_path": None}))[0]
    assert same["logratio/chosen"] == pytest.approx(0, abs=1e-5)


def test_two_ranks_fill_one_cache(small_run, two_ranks, tmp_path, capsys):
    result = two_ranks("train_pipa", *small_run("two", **{"ds.zero_stage": 3, "ckpt.save_steps": None}))
    assert result.returncode == 0, result.stderr[-2000:]
    assert hits_and_misses(result.stdout) == [(0, 10)]
    assert len(shards(tmp_path / "cache")) == 2
    rows = train("train_pipa", *small_run("one"))
    assert hits_and_misses(capsys.readouterr().out) == [(10, 0)]
    assert rows[0]["loss"] == pytest.approx(read_jsonl(tmp_path / "two" / "metrics.jsonl")[0]["loss"], rel=1e-5)


def test_damaged_shard_stops_a_run_in_one_line(small_run, tmp_path, capsys):
    train("train_pipa", *small_run("a"))
    (path,) = shards(tmp_path / "cache")
    with open(path, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff")
    capsys.readouterr()
    assert run_in_process("train_pipa", *small_run("b")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and path in errors[0]
    os.remove(path)
    assert run_in_process("train_pipa", *small_run("b")) == 0
    assert hits_and_misses(capsys.readouterr().out) == [(0, 10)]


def test_prior_that_computes_nan_stops_a_run_in_one_line(small_run, tiny_models, tmp_path, capsys):
    shutil.copytree(tiny_models / "prior", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    for checks, named in (("true", str(tmp_path / "broken")), ("false", "data.jsonl line ")):
        changes = {"prior.model_name_or_path": tmp_path / "broken", "model.self_check": checks}
        assert run_in_process("train_pipa", *small_run("a", **changes)) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and named in errors[0] and "nan" in errors[0]
    assert shards(tmp_path / "cache") == []


def test_prior_trained_on_negatives_by_lora(small_run, tmp_path, capsys):
    """Table 3: SFT on wrong answers with LoRA, and its adapter folder is the prior."""
    drop = {name: None for name in ("prior.model_name_or_path", "prior.cache_dir", "pipa.variant", "data.annotation")}
    sft = {**drop, "data.keep": "negative", "ds.lora.rank": 2, "ckpt.save_steps": None, "adam.lr": 0.05}
    train("train_sft", *small_run("negative", **sft))
    with_adapter = {"prior.model_name_or_path": tmp_path / "negative"}
    rows = train("train_pipa", *small_run("out", **with_adapter))
    # The prior has learned the wrong answers, the policy has not.
    assert rows[0]["logratio/rejected"] < -1
    merged = {**sft, "ckpt.merge_lora": True}
    train("train_sft", *small_run("merged", **merged))
    again = train("train_pipa", *small_run("again", **{"prior.model_name_or_path": tmp_path / "merged"}))
    assert again[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
