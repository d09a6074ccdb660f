"""Asked to stop, a run ends after the running step with a checkpoint, whoever asks and whenever."""

import os
import signal
import threading

import pytest
from tiny import read_jsonl, run_in_process, train

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.training import run
from pipa_openrlhf.training.run import StopOnSignals
from pipa_openrlhf.training.trainer import Callback

SFT = {
    "prior.model_name_or_path": None,
    "prior.cache_dir": None,
    "pipa.variant": None,
    "ckpt.save_steps": None,
    "data.keep": "all",
}


class Stopping(Callback):
    """Stops when told to."""

    def __init__(self, wants_stop):
        self.wants_stop = wants_stop


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_callable_ends_the_run_after_its_step(small_run, tmp_path):
    asked = []
    config = parse("train_sft", small_run("out", **SFT))
    with pytest.raises(KeyboardInterrupt):
        run.train(config, [Stopping(lambda: asked.append(1) or len(asked) == 3)])
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
    config = parse("train_sft", small_run("out", **SFT, **{"train.max_epochs": 4}))
    with pytest.raises(KeyboardInterrupt):
        run.train(config, [Stopping(lambda: bool(requests))])
    assert checkpoints(tmp_path / "out") == ["global_step3"]


def test_training_runs_outside_the_main_thread(small_run, tmp_path):
    """As Ray runs it: no signal handler may be set there."""
    failures = []

    def work():
        try:
            run.train(parse("train_sft", small_run("out", **SFT)))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) > 1


def test_signals_become_a_question():
    before = signal.getsignal(signal.SIGINT)
    signals = StopOnSignals()
    signals.on_train_begin(None)
    assert not signals.wants_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wants_stop()
    os.kill(os.getpid(), signal.SIGINT)  # the first ctrl-C, beside the launcher's SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signals.on_train_end(None)
    assert signal.getsignal(signal.SIGINT) is before


class Terminated(Callback):
    """Gets a SIGTERM inside its second step."""

    def on_update_begin(self, trainer) -> None:
        if trainer.position.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_line_hands_its_signals_to_the_trainer(small_run, tmp_path):
    """A SIGTERM that arrives inside a step ends the run after it."""
    words = small_run("out", **SFT, **{"train.max_epochs": 4})
    assert run_in_process("train_sft", *words, callbacks=[Terminated()]) == 0
    assert checkpoints(tmp_path / "out") == ["global_step3"], "the sum of step 2 was over when the signal came"


class Signalled(Callback):
    """Gets a signal in the prior's first forward pass."""

    def __init__(self, number: int):
        self.number = number

    def on_prior_begin(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("prior", ["its own", "another"])
def test_a_signal_during_the_prior_pass_keeps_what_was_scored(small_run, tmp_path, capsys, prior, number, status):
    changes = {} if prior == "another" else {"prior.model_name_or_path": None}
    words = small_run("out", **changes, **{"train.max_tokens_per_micro_batch": 30})
    before = signal.getsignal(number)
    assert run_in_process("train_pipa", *words, callbacks=[Signalled(number)]) == status
    assert signal.getsignal(number) is before
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopped")]
    scored = int(line.split()[5])
    assert line == f"Stopped after the prior scored {scored} of 10 answers; go on with --ckpt.load_enable"
    assert 0 < scored < 10
    rows = train("train_pipa", *words, "--ckpt.load_enable")
    assert f"Prior cache: {scored} hits, {10 - scored} misses" in capsys.readouterr().out
    assert len(rows) == 6
