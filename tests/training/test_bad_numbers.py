"""NaN and infinite losses and gradients end a run before they reach the weights, on every rank alike."""

import pytest
import torch
from tiny import run_in_process, run_module

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
PLAIN = {"prior.model_name_or_path": None, "pipa.variant": None, "ckpt.save_steps": 1, "adam.lr": 1e-3}


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
