"""A separate prior is gone from memory once its log-probs are cached."""

import gc
import weakref

import pytest
import torch
from tiny import make_model, make_tokenizer, train

from pipa_openrlhf.training import run as run_file

WIDTH = 24  # of the prior alone


def prior_tensors() -> list[torch.Size]:
    gc.collect()
    return [
        one.shape
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and (WIDTH in one.shape or WIDTH in getattr(one, "ds_shape", ()))
    ]


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_holds_the_prior(small_run, tmp_path, monkeypatch, stage):
    make_model(4, hidden_size=WIDTH, intermediate_size=3 * WIDTH).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    modules, alive = [], []
    real_fill, real_build = run_file.fill_from_separate_model, run_file.build_policy

    def build(*args, **options):
        alive.append(([one() for one in modules if one() is not None], prior_tensors()))
        return real_build(*args, **options)

    def fill(args, cache, samples, strategy, pad_token_id, callbacks):
        prepare = strategy.prepare

        def spy(actor):
            modules.append(weakref.ref(actor.model))
            assert prior_tensors() != []
            return prepare(actor)

        strategy.prepare = spy
        real_fill(args, cache, samples, strategy, pad_token_id, callbacks)
        strategy.prepare = prepare

    monkeypatch.setattr(run_file, "fill_from_separate_model", fill)
    monkeypatch.setattr(run_file, "build_policy", build)
    changes = {"prior.model_name_or_path": tmp_path / "wide", "ds.zero_stage": stage, "ckpt.save_steps": None}
    train("train_pipa", *small_run("out", **changes))
    assert len(modules) == 1 and alive == [([], [])]
