"""Twenty optimizer steps of every objective follow a recorded trajectory, in every layout, through the command line.

Tests that compare two runs of today's code cannot see both of them drift. ``reference_trajectories.json`` beside this
file holds what was computed once, and only the command line's flags and files are used to compute it again, so that
it outlives any change inside. A change that is meant to alter losses makes it anew, in the repository's root:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/training/test_reference_trajectories.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import flags, make_model, make_tokenizer, read_jsonl, train, write_jsonl

RECORD = Path(__file__).with_name("reference_trajectories.json")
FORMAT = (
    "trajectories: objective -> loss and grad_norm, each a list with one number for each of 20 optimizer steps, as "
    "metrics.jsonl has them (loss of the whole global batch before the update, norm of the gradient before clipping), "
    "in the layout 'padded' on one rank. Names, flags, data and model are those of test_reference_trajectories.py, "
    "whose first lines say how to make this file anew."
)
STEPS = 20

# Layouts, and processors with and without vector instructions, round differently: here that moves a loss by up to
# 1.5e-6, the mean by up to 1.5e-7 and a norm by up to 2e-5 of itself. Anything larger is another computation.
LOSS_TOLERANCE = 1e-5
# Rounding has no direction, so that its mean over the steps is far smaller: an error of one sign shows here first.
DRIFT_TOLERANCE = 1e-6
# Relative. Adam and clipping hide a gradient of the wrong size from the losses.
NORM_TOLERANCE = 1e-4

STEP = {"data.annotation": "step"}
PAIRS = {"train.batch_size": 5}
# name -> module and flags. All have five batches an epoch, the last of them partial.
OBJECTIVES = {
    # Means over tokens for one and the default, sums, for the other.
    "pipa_m": ("train_pipa", {**STEP, "pipa.loss_reduction": "token_mean"}),
    "pipa_n": ("train_pipa", {**STEP, "pipa.variant": "n"}),
    "dpo": ("train_dpo", PAIRS),
    # A square of sums of log-probs multiplies their rounding: with this target, 1 / (2 beta), and rate it stays small.
    "ipo": ("train_dpo", {**PAIRS, "model.ipo_enable": True, "model.beta": 2, "adam.lr": 1e-4}),
    "step_dpo_l1": ("train_dpo", {**PAIRS, **STEP}),
    "step_dpo_l0": ("train_dpo", {**PAIRS, **STEP, "dpo.step_loss": "l0"}),
    "kto": ("train_kto", {}),
    "step_kto_l1": ("train_kto", STEP),
    "step_kto_per_step": ("train_kto", {**STEP, "kto.step_loss": "per_step"}),
    "sft": ("train_sft", PAIRS),
}
MAIN = ("pipa_m", "pipa_n", "dpo", "kto")
SHARED, PACKED = {"train.share_prefixes": "true"}, {"ds.packing_samples": True}
RECOMPUTED = {"model.gradient_checkpointing_enable": True}
# name -> ranks, flags beside those of "padded", objectives.
LAYOUTS = {
    "padded": (1, {}, OBJECTIVES),
    "shared_prefixes": (1, SHARED, OBJECTIVES),
    "one_a_micro_batch_two_passes": (1, {"train.micro_batch_size": 1, "train.fused_head": "false"}, MAIN),
    "packed_checkpointing": (1, {**PACKED, **RECOMPUTED}, MAIN),
    "shared_checkpointing_zero_1": (1, {**SHARED, **RECOMPUTED, "ds.zero_stage": 1}, MAIN),
    "zero_3": (1, {"ds.zero_stage": 3}, MAIN),
    "two_ranks": (2, {}, MAIN),
    "two_ranks_zero_2": (2, {"ds.zero_stage": 2, **PACKED}, MAIN),
    "two_ranks_zero_2_shared": (
        2,
        {**SHARED, **RECOMPUTED, "model.gradient_checkpointing_reentrant": True, "ds.zero_stage": 2},
        MAIN,
    ),
    "two_ranks_zero_3": (2, {"ds.zero_stage": 3, **SHARED}, MAIN),
}


def pairs() -> list[dict]:
    """24 pairs, three to a problem, of unequal lengths; right and wrong steps in both answers of a pair."""
    rows = []
    for problem in range(8):
        a, b = problem + 2, 3 * problem % 7 + 1
        for number in range(3):
            work, wrong = f"{a}+{b}", a + b + 1 + number
            rows.append(
                {
                    "prompt": f"What is {'about ' * (problem % 3)}{a} plus {b}?\n",
                    "chosen": [[work, f"{a + b}"], [f"={a + b}"], ["?", work, f"is {a + b}"]][number],
                    "chosen_labels": [[1, 1], [1], [problem % 2, 1, 1]][number],
                    "rejected": [[work, f"{wrong}"], [f"{b}-", work, f"{wrong}!"], [f"{wrong}" * (1 + problem % 4)]][
                        (number + problem) % 3
                    ],
                    "rejected_labels": [[1, 0], [0, problem % 2, 0], [0]][(number + problem) % 3],
                }
            )
    return rows


def write_inputs(root: Path) -> None:
    """Data, policy, prior and value head, from one generator of numbers that no library's initialisation touches."""
    write_jsonl(root / "pairs.jsonl", pairs())
    rng = np.random.default_rng(0)

    def noise(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(tensor.shape)) * scale).float()

    model = make_model(0).requires_grad_(False)
    weights = dict(sorted(model.named_parameters()))
    for name, weight in weights.items():
        weight.copy_(1 + noise(weight, 0.1) if "norm" in name else noise(weight, 0.2))
    save(model, root / "policy")
    # Near enough to the policy that PIPA-M's F of wrong tokens, where its loss is steep, keeps away from 1.
    for weight in weights.values():
        weight.add_(noise(weight, 0.01))
    save(model, root / "prior")
    size = model.config.hidden_size
    head = {"dense.weight": (size, size), "dense.bias": (size,), "out.weight": (1, size), "out.bias": (1,)}
    (root / "value").mkdir()
    values = {name: noise(torch.empty(shape), 0.1) for name, shape in head.items()}
    save_file(values, root / "value" / "value_head.safetensors")
    config = {"input_size": size, "hidden_size": size, "activation": "relu"}
    (root / "value" / "value_head_config.json").write_text(json.dumps(config))


def save(model, folder: Path) -> None:
    """Model and tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def command(root: Path, objective: str, layout: str) -> tuple[str, list[str]]:
    """Module and flags of a run, which writes to ``root/layout/objective``."""
    module, changes = OBJECTIVES[objective]
    values = {
        "model.model_name_or_path": root / "policy",
        "data.dataset": root / "pairs.jsonl",
        "ds.param_dtype": "fp32",
        "ds.zero_stage": 0,
        "train.batch_size": 10,
        "train.micro_batch_size": 8,
        "train.max_epochs": 4,
        "train.share_prefixes": "false",
        # It would put another layout in the place of one that is wrong.
        "model.self_check": "false",
        "adam.lr": 5e-4,
        "ckpt.output_dir": root / layout / objective,
        **changes,
        **LAYOUTS[layout][1],
    }
    if module != "train_sft":
        values["prior.model_name_or_path"] = root / "prior"
        # Of the layout's own, so that its pass over the prior is followed too.
        values["prior.cache_dir"] = root / layout / "cache"
    if module == "train_pipa":
        values["value.init_from"] = root / "value"
    return module, flags(values)


def trajectory(rows: list[dict]) -> dict[str, list[float]]:
    """What is recorded of metrics.jsonl."""
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    write_inputs(folder)
    return folder


def cases() -> list:
    """Every layout with its objectives."""
    return [(layout, name) for layout, (_, _, objectives) in LAYOUTS.items() for name in objectives]


@pytest.mark.parametrize("layout, objective", cases())
def test_the_recorded_trajectory_is_followed(root, layout, objective, two_ranks):
    module, words = command(root, objective, layout)
    if LAYOUTS[layout][0] == 1:
        rows = train(module, *words)
    else:
        result = two_ranks(module, *words)
        assert result.returncode == 0, result.stderr[-3000:]
        rows = read_jsonl(root / layout / objective / "metrics.jsonl")
    recorded, got = json.loads(RECORD.read_text())["trajectories"][objective], trajectory(rows)
    assert len(got["loss"]) == len(recorded["loss"]) == STEPS
    off = np.subtract(got["loss"], recorded["loss"])
    assert np.abs(off).max() <= LOSS_TOLERANCE, off
    assert abs(off.mean()) <= DRIFT_TOLERANCE, off
    ratios = np.divide(got["grad_norm"], recorded["grad_norm"])
    assert np.abs(ratios - 1).max() <= NORM_TOLERANCE, ratios


def write_record() -> None:
    """Make ``reference_trajectories.json`` anew."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        runs = {objective: command(Path(folder), objective, "padded") for objective in OBJECTIVES}
        trajectories = {objective: trajectory(train(module, *words)) for objective, (module, words) in runs.items()}
    RECORD.write_text(json.dumps({"format": FORMAT, "trajectories": trajectories}, indent=1) + "\n")


if __name__ == "__main__":
    write_record()
