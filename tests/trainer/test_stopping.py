"""Asked to stop, a run ends after the running step with a checkpoint, whoever asks and whenever."""

import threading
from contextlib import contextmanager

import pytest
from tiny import read_jsonl

from pipa_openrlhf.cli import train_sft
from pipa_openrlhf.cli.args import parse_args
from pipa_openrlhf.cli.signals import stop_on_signals
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.losses.objectives import objectives
from pipa_openrlhf.trainer.batch_loss import LossSettings
from pipa_openrlhf.trainer.run import train

SFT = {
    "prior.model_name_or_path": None,
    "prior.cache_dir": None,
    "pipa.variant": None,
    "ckpt.save_steps": None,
    "data.keep": "all",
}


def stopping_with(stop):
    @contextmanager
    def stopping():
        yield stop

    return stopping


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_callable_ends_the_run_after_its_step(small_run, tmp_path):
    asked = []
    args = parse_args("train_sft", small_run("out", **SFT))
    with pytest.raises(KeyboardInterrupt):
        train(args, objectives()["sft"], LossSettings(), stopping_with(lambda: asked.append(1) or len(asked) == 3))
    assert checkpoints(tmp_path / "out") == ["global_step3"]
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 3


def test_a_request_that_comes_during_the_metrics_sum_is_not_lost(small_run, tmp_path, monkeypatch):
    """The sum says what was known before it; the next step sees the request."""
    requests, sums = [], []
    all_reduce = Strategy.all_reduce

    def with_request(self, data, op="sum"):
        result = all_reduce(self, data, op)
        if op == "sum":
            sums.append(1)
            if len(sums) == 2:
                requests.append(1)
        return result

    monkeypatch.setattr(Strategy, "all_reduce", with_request)
    args = parse_args("train_sft", small_run("out", **SFT, **{"train.max_epochs": 4}))
    with pytest.raises(KeyboardInterrupt):
        train(args, objectives()["sft"], LossSettings(), stopping_with(lambda: bool(requests)))
    assert checkpoints(tmp_path / "out") == ["global_step3"]


def test_training_runs_outside_the_main_thread(small_run, tmp_path):
    """As Ray runs it: no signal handler may be set there."""
    failures = []

    def work():
        try:
            train(parse_args("train_sft", small_run("out", **SFT)), objectives()["sft"], LossSettings())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) > 1


def test_signals_become_a_question():
    import os
    import signal

    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)  # the first ctrl-C, beside the launcher's SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_line_hands_its_signals_to_the_trainer(small_run, tmp_path, monkeypatch):
    """A SIGTERM that arrives inside a step ends the run after it."""
    import os
    import signal

    from pipa_openrlhf.trainer.preference_trainer import PreferenceTrainer

    step_engine = PreferenceTrainer._step_engine
    steps = []

    def terminated(self):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_engine(self)

    monkeypatch.setattr(PreferenceTrainer, "_step_engine", terminated)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(parse_args("train_sft", small_run("out", **SFT, **{"train.max_epochs": 4})))
    assert checkpoints(tmp_path / "out") == ["global_step3"], "the sum of step 2 was over when the signal came"
