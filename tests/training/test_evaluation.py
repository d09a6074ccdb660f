"""Evaluation: one micro-batch in memory, each made once; every log gets its results."""

import sys
import types
import weakref

import pytest
from tiny import read_jsonl, train

from pipa_openrlhf.data import training_set
from pipa_openrlhf.training.trainer import Callback

EVALUATED = {"ckpt.save_steps": None, "train.max_epochs": 1, "train.micro_batch_size": 1}


@pytest.mark.parametrize("module, passes", [("train_pipa", 1), ("train_kto", 2)])
def test_every_micro_batch_is_made_once_and_let_go(small_run, monkeypatch, module, passes):
    """KTO's mismatched completions are a second pass, before the answers."""
    alive, most, made = [], [], []
    collate = training_set.collate

    def counted(*args, **options):
        batch = collate(*args, **options)
        made.append(len(batch.labels))
        alive.append(1)
        most.append(len(alive))
        weakref.finalize(batch.labels, alive.pop)  # a CPU's batch on its device holds the same tensors
        return batch

    class Evaluated(Callback):
        """Evaluates once by itself, with batches that are counted."""

        def on_train_begin(self, trainer) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(training_set, "collate", counted)
                assert trainer.evaluate()["loss"] > 0

    words = small_run("out", **EVALUATED, **({} if module == "train_pipa" else {"pipa.variant": None}))
    data = words[words.index("--data.dataset") + 1]
    rows = train(module, *words, "--eval.dataset", data, callbacks=[Evaluated()])
    assert "eval/loss" in rows[-1]
    assert sum(made) == 10 * passes, "ten answers, each made once a pass"
    assert max(most) <= 2, "the one that is run, and the next one"


def test_tensorboard_gets_every_evaluation(small_run, tmp_path, monkeypatch):
    """--eval.steps 3 --logger.logging_steps 2: step 3 is evaluated and no training row is logged at it."""
    written = []

    class SummaryWriter:
        def __init__(self, log_dir):
            pass

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    words = small_run(
        "out",
        **{
            "ckpt.save_steps": None,
            "eval.steps": 3,
            "logger.logging_steps": 2,
            "logger.tensorboard_dir": tmp_path / "board",
        },
    )
    train("train_pipa", *words, "--eval.dataset", words[words.index("--data.dataset") + 1])
    assert [step for name, step in written if name == "eval/loss"] == [3, 6]
    assert [step for name, step in written if name == "train/loss"] == [2, 4, 6]


def test_the_share_of_right_tokens_is_logged(small_run, tmp_path):
    rows = train("train_pipa", *small_run("out", **{"ckpt.save_steps": None, "train.batch_size": 10}))
    data = read_jsonl(tmp_path / "data.jsonl")
    right = total = 0
    for row in data:
        # The separator belongs to the step before it, eos to the last step; one token a byte.
        tokens = [len(row["completions"][0]) + 1, len(row["completions"][1]) + 1]
        right += sum(count for count, label in zip(tokens, row["labels"]) if label)
        total += sum(tokens)
    assert rows[0]["right_token_share"] == pytest.approx(right / total)
