"""NaN and infinite losses and gradients end a run before they reach the weights, on every rank alike."""

import pytest
import torch
from tiny import run_in_process, run_module

from pipa_openrlhf.training.trainer import PreferenceTrainer

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
PLAIN = {"prior.model_name_or_path": None, "pipa.variant": None, "ckpt.save_steps": 1, "adam.lr": 1e-3}


def planted(folder, loss="1.0", gradient="1.0", after=2) -> str:
    path = folder / "planted.py"
    path.write_text(OBJECTIVE.format(loss=loss, gradient=gradient, after=after))
    return str(path)


@pytest.fixture
def updates(monkeypatch):
    """List that gets the trained weights after every update that was tried, failed ones included."""
    seen = []
    step_engine = PreferenceTrainer._step_engine

    def recorded(self):
        try:
            return step_engine(self)
        finally:
            trained = (one for one in self.actor.model.module.parameters() if one.requires_grad)
            # Under ZeRO-3 a parameter is empty between forward passes, and its part stands beside it.
            seen.append([getattr(one, "ds_tensor", one).detach().clone() for one in trained])

    monkeypatch.setattr(PreferenceTrainer, "_step_engine", recorded)
    return seen


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_loss_that_is_no_number_changes_no_weight(small_run, tmp_path, updates, capsys, value):
    module = planted(tmp_path, loss=value)
    assert run_in_process("train_pipa", *small_run("out", **PLAIN, **{"pipa.objective_module": module})) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "loss of step 2" in line and "learning rate" in line and "--ckpt.load_enable" in line
    assert len(updates) == 1, "the second update was not begun"
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["global_step1"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_no_number_changes_no_weight(small_run, tmp_path, updates, capsys, stage, dtype):
    module = planted(tmp_path, gradient="float('nan')")
    words = small_run(
        "out", **PLAIN, **{"pipa.objective_module": module, "ds.zero_stage": stage, "ds.param_dtype": dtype}
    )
    assert run_in_process("train_pipa", *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "gradient of step 2" in line
    first, second = updates[0], updates[-1]
    assert len(updates) == 2 and sum(one.numel() for one in first) > 1000
    assert all(torch.isfinite(one).all() for one in second)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_two_ranks_stop_together(small_run, tmp_path):
    """Only the rank with the wrong answers has the loss that is no number."""
    module = planted(tmp_path, loss="float('nan')", after=0)
    changes = {"pipa.objective_module": module, "train.batch_size": 2, "train.micro_batch_size": 1, "ds.zero_stage": 2}
    result = run_module("train_pipa", *small_run("out", **PLAIN | changes), ranks=2, timeout=120)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "loss of step" in lines[0], result.stderr[-2000:]
