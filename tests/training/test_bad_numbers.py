"""NaN and infinite losses and gradients never reach the weights, on any rank; steps with them are left out."""

import pytest
import torch
from tiny import read_jsonl, run_in_process, run_module, train, write_jsonl

from pipa_openrlhf.training.engine_state import EngineState
from pipa_openrlhf.training.trainer import Callback

# From the second step on, wrong tokens have the loss and the gradient that the two lines give them.
OBJECTIVE = """
import torch
from pipa_openrlhf.objectives.objective import Objective

calls = []

class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_f):
        return log_f.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * {gradient}

def token_loss(log_f, log_p, u, label):
    calls.append(1)
    if len(calls) <= {after}:
        return -log_f
    return torch.where(label == 0, -Planted.apply(log_f) * {loss}, -log_f)

def make_objective(config):
    return Objective("planted", "", "", "", "", token_loss=token_loss, needs_prior=False)
"""
NO_PRIOR = {"prior.model_name_or_path": None, "pipa.variant": None, "ckpt.save_steps": 1, "adam.lr": 1e-3}
PLAIN = {**NO_PRIOR, "train.max_bad_steps": 0}


# Wrong tokens have a loss that is no number, and no gradient: that of every other token is finite.
ONE_BAD = (
    OBJECTIVE.split("calls = []")[0]
    + """
def token_loss(log_f, log_p, u, label):
    return torch.where(label == 0, torch.full_like(log_f, float("{value}")), -log_f)

def make_objective(config):
    return Objective("planted", "", "", "", "", token_loss=token_loss, needs_prior=False)
"""
)


def planted(folder, loss="1.0", gradient="1.0", after=2) -> str:
    path = folder / "planted.py"
    path.write_text(OBJECTIVE.format(loss=loss, gradient=gradient, after=after))
    return str(path)


class Weights(Callback):
    """The trained weights after every step that ended and at the end of the run, and how many updates were begun."""

    def __init__(self):
        self.after_steps: list[list[torch.Tensor]] = []
        self.at_end: list[torch.Tensor] = []
        self.updates = 0

    def on_update_begin(self, trainer) -> None:
        self.updates += 1

    def on_step_end(self, trainer, row) -> None:
        self.after_steps.append(self._copy(trainer))

    def on_train_end(self, trainer) -> None:
        self.at_end = self._copy(trainer)

    def _copy(self, trainer) -> list[torch.Tensor]:
        trained = (one for one in trainer.actor.model.module.parameters() if one.requires_grad)
        # Under ZeRO-3 a parameter is empty between forward passes, and its part stands beside it.
        return [getattr(one, "ds_tensor", one).detach().clone() for one in trained]


def assert_only_the_first_step_counts(weights: Weights) -> None:
    [first], end = weights.after_steps, weights.at_end
    assert sum(one.numel() for one in first) > 1000
    assert all(torch.isfinite(one).all() for one in end)
    assert all(torch.equal(one, other) for one, other in zip(first, end, strict=True))


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_loss_that_is_no_number_changes_no_weight(small_run, tmp_path, capsys, value):
    weights = Weights()
    words = small_run("out", **PLAIN, **{"pipa.objective_module": planted(tmp_path, loss=value)})
    assert run_in_process("train_pipa", *words, callbacks=[weights]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "loss of step 2" in line and "learning rate" in line and "--ckpt.load_enable" in line
    assert weights.updates == 1, "the second update was not begun"
    assert_only_the_first_step_counts(weights)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["global_step1"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_no_number_changes_no_weight(small_run, tmp_path, capsys, stage, dtype):
    weights = Weights()
    module = planted(tmp_path, gradient="float('nan')")
    words = small_run(
        "out", **PLAIN, **{"pipa.objective_module": module, "ds.zero_stage": stage, "ds.param_dtype": dtype}
    )
    assert run_in_process("train_pipa", *words, callbacks=[weights]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "gradient of step 2" in line
    assert weights.updates == 2
    assert_only_the_first_step_counts(weights)


def test_two_ranks_stop_together(small_run, tmp_path):
    """Only the rank with the wrong answers has the loss that is no number."""
    module = planted(tmp_path, loss="float('nan')", after=0)
    changes = {"pipa.objective_module": module, "train.batch_size": 2, "train.micro_batch_size": 1, "ds.zero_stage": 2}
    result = run_module("train_pipa", *small_run("out", **PLAIN | changes), ranks=2, timeout=120)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "loss of step" in lines[0], result.stderr[-2000:]


@pytest.fixture
def one_bad_record(small_run, tmp_path):
    """``one_bad_record(output, value, line)``: flags of six steps, three an epoch; the line's record is bad."""

    def make(output, value="nan", line=4, **changes) -> list[str]:
        rows = [{"prompt": f"{n}:", "completion": "abc"[: n % 3 + 1], "label": n != line} for n in range(1, 11)]
        data = write_jsonl(tmp_path / "ten.jsonl", rows)
        module = tmp_path / "one_bad.py"
        module.write_text(ONE_BAD.format(value=value))
        changes = {"pipa.objective_module": module, "data.dataset": data, "data.annotation": "answer", **changes}
        return small_run(output, **NO_PRIOR, **{"train.micro_batch_size": 1, **changes})

    return make


class Updates(Weights):
    """How many updates Adam has counted, too."""

    def on_train_end(self, trainer) -> None:
        super().on_train_end(trainer)
        self.counted = EngineState(trainer.actor.model).updates


def assert_rate_stays_after(bad: list[int], rows: list[dict]) -> None:
    """The schedule moves with every update, and only with one."""
    rates = [row["lr"] for row in rows]
    assert all((rates[index] == rates[index - 1]) == (index - 1 in bad) for index in range(1, 6))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_one_bad_record_is_left_out_and_the_record_named(
    one_bad_record, tmp_path, log_lines, stage, dtype
):
    weights = Updates()
    words = one_bad_record("out", **{"ds.zero_stage": stage, "ds.param_dtype": dtype, "lr_warmup_ratio": 0})
    rows = train("train_pipa", *words, callbacks=[weights])
    bad = [index for index, row in enumerate(rows) if row["loss"] is None]
    assert len(rows) == 6 and len(bad) == 2 and 0 < bad[0] < 3 <= bad[1], "one step an epoch"
    assert [row["bad_steps"] for row in rows] == [sum(one <= index for one in bad) for index in range(6)]
    assert weights.updates == weights.counted == 4
    for index in range(1, 6):
        before, after = weights.after_steps[index - 1 : index + 1]
        assert all(map(torch.equal, before, after)) == (index in bad)
    assert_rate_stays_after(bad, rows)
    lines = [line for line in log_lines if "is left out" in line]
    assert [line.split(" (")[0] for line in lines] == [
        f"Step {index + 1} is left out, its loss is nan: {tmp_path}/ten.jsonl line 4" for index in bad
    ]


def test_a_first_step_that_is_left_out_has_no_checkpoint(one_bad_record, tmp_path):
    """Adam has no moments yet that could be kept."""
    rows = train("train_pipa", *one_bad_record("out", line=7))
    assert rows[0]["bad_steps"] == 1
    assert "global_step1" not in [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    resumed = train("train_pipa", *one_bad_record("out", line=7, **{"train.max_epochs": 3}), "--ckpt.load_enable")
    assert len(resumed) == 9 and resumed[-1]["bad_steps"] == 3


def test_an_infinite_loss_is_left_out(one_bad_record):
    weights = Updates()
    rows = train("train_pipa", *one_bad_record("out", value="inf"), callbacks=[weights])
    assert rows[-1]["bad_steps"] == 2 and weights.updates == weights.counted == 4


def test_a_bad_gradient_alone_names_the_batch(small_run, tmp_path, log_lines):
    module = planted(tmp_path, gradient="float('nan')")
    rows = train("train_pipa", *small_run("out", **NO_PRIOR, **{"pipa.objective_module": module}))
    assert rows[-1]["bad_steps"] > 1 and rows[-1]["grad_norm"] is None
    lines = [line for line in log_lines if "is left out" in line]
    assert len(lines) == rows[-1]["bad_steps"]
    assert all("gradient is" in line and line.count("data.jsonl line") in (2, 4) for line in lines)


def test_bad_steps_are_counted_over_resumes(one_bad_record, tmp_path, capsys):
    assert run_in_process("train_pipa", *one_bad_record("out", **{"train.max_bad_steps": 1})) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "more than --train.max_bad_steps 1: look at" in error and "ten.jsonl line 4" in error
    before = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert 3 <= len(before) < 6
    words = one_bad_record("out", **{"train.max_bad_steps": 2})
    rows = train("train_pipa", *words, "--ckpt.load_enable")
    assert len(rows) == 6 and rows[-1]["bad_steps"] == 2
    assert rows[: len(before)] == before


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_leave_out_the_same_step(one_bad_record, two_ranks, tmp_path, stage):
    words = one_bad_record("out", **{"ds.zero_stage": stage, "lr_warmup_ratio": 0})
    result = two_ranks("train_pipa", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    bad = [index for index, row in enumerate(rows) if row["loss"] is None]
    assert len(bad) == rows[-1]["bad_steps"] == 2
    assert_rate_stays_after(bad, rows)
    lines = [line for line in result.stdout.splitlines() if "is left out" in line]
    assert len(lines) == 2 and all(f"{tmp_path}/ten.jsonl line 4 (" in line for line in lines)
