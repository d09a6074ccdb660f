"""Every causal-LM class of the installed transformers: what the self-check admits is the model's own forward pass."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from samples import random_samples
from shrunk import VOCAB, causal_lm_classes, shrunk_model

from pipa_openrlhf.config import DeepSpeedConfig, RunConfig, TrainConfig
from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.data.samples import as_samples
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import Policy, PolicyActor
from pipa_openrlhf.model.self_check import choose_layout

# Longer than the sequences of the check, longer than every window.
LENGTHS = [(30, 33), (21, 9), (30, 14), (17, 40), (21, 26), (30, 1)]


def samples_of_a_run(seed: int):
    """Three answers to one prompt, two to another, one to a third; some begin alike; no special tokens."""
    samples = random_samples(LENGTHS, VOCAB - 3, seed)
    samples = [replace(one, input_ids=one.input_ids + 3) for one in samples]
    for index, first, size in ((2, 0, 36), (5, 0, 30), (4, 1, 25)):
        samples[index].input_ids[:size] = samples[first].input_ids[:size]
    return samples


def own_log_probs(model, samples) -> list[torch.Tensor]:
    """Computed here, from the whole logits of one sequence after the other."""
    results = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0].double()
        log_probs = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]]
        results.append(log_probs[sample.prompt_len - 1 :].float())
    return results


def run_flags(share_prefixes: bool, packing_samples: bool) -> RunConfig:
    return RunConfig(
        ds=DeepSpeedConfig(packing_samples=packing_samples), train=TrainConfig(share_prefixes=share_prefixes)
    )


ASKED = {"padded": (False, False), "packed": (False, True), "shared": (True, False)}


def actor_of(model) -> PolicyActor:
    """With gradient checkpointing where the model has it."""
    actor = PolicyActor(Policy(model))
    actor.model.eval()
    if model.supports_gradient_checkpointing:
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return actor


@pytest.mark.slow
@pytest.mark.parametrize("model_class", causal_lm_classes(), ids=lambda one: one.__name__)
@torch.no_grad()
def test_admitted_layouts_are_exact(model_class, capsys, log_lines):
    """All classes together: 70 seconds of one core."""
    transformers.logging.set_verbosity_error()
    name = model_class.__name__

    def report(line: str) -> None:
        with capsys.disabled():
            print(f"\n{name}: {line}", end="")

    try:
        model = shrunk_model(model_class)
    except Exception as error:  # a class that wants more than small sizes; its name and reason are printed
        report(f"not built: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        return
    samples = samples_of_a_run(seed=1)
    expected = own_log_probs(model, samples)
    exact, lines = [], log_lines
    strategy = SimpleNamespace(all_reduce=lambda tensor, op: tensor)
    # Each as a run would ask for it; the default is to share prompts.
    for layout, flags in ASKED.items():
        lines.clear()
        try:
            actor = actor_of(shrunk_model(model_class))
            choose_layout(run_flags(*flags), actor, as_samples(samples_of_a_run(seed=2)), strategy, 0)
        except UserError as error:
            report(f"refused: {error}")
            return
        if actor.layout != layout:
            report("; ".join(lines))
            continue
        rows = actor(collate(samples, None, 0, layout, every_response_token=True)).log_f
        error = max((row[: len(own)] - own).abs().max().item() for row, own in zip(rows, expected))
        exact.append(f"{layout} ({error:.1e})")
        assert error < 2e-3, layout
    report(f"exact: {' '.join(exact)}")
