"""The FLOPs of a training step against the least that its forward and backward pass can take.

    python benchmarks/limit.py [--output FILE]

The limit is 2b + 2h x loss tokens + a: b one forward pass of the backbone, h = 2 x hidden x vocabulary a token, and a
once more attention's products, both factors of which need a gradient. Beyond it are the value head, LoRA's weight
gradients and whatever is computed twice. The small model is trained by the whole trainer with DeepSpeed; models of 7B
have shapes only, and their step is the policy's forward and backward pass.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from inputs import equal_problems, load_tokenizer, make_model, usual_rank, write_data
from measure import count_flops, flop_counter, print_head, print_ratio, print_table, write_json
from shapes import MODELS, our_actor, our_loss
from torch import nn
from workers import Spec, pipa_flags

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.model.policy import Policy
from pipa_openrlhf.training.run import train
from pipa_openrlhf.training.trainer import Callback

MOST = 1.03
PARTS = ("2b", "2h x loss tokens", "a", "step")


def parts_of(policy: Policy, backbone_calls: list[dict], loss_tokens: int, step: int) -> dict[str, int]:
    """The parts of the limit beside the FLOPs of a ``step``.

    Args:
        backbone_calls: the arguments of the backbone's forward passes in that step.
    """
    backbone: nn.Module = policy._backbone[0]

    @torch.no_grad()
    def forward() -> None:
        for options in backbone_calls:
            backbone(**options)

    with flop_counter() as counter:
        forward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(flops for kernel, flops in counts.items() if "attention" in str(kernel) or "bmm" in str(kernel))
    head = 2 * 2 * policy.causal_lm.get_output_embeddings().weight.numel() * loss_tokens
    return dict(zip(PARTS, (2 * sum(counts.values()), head, attention, step)))


def record_calls(policy: Policy) -> list[dict]:
    """A list that gets the arguments of the backbone's calls from now on."""
    calls: list[dict] = []
    policy._backbone[0].register_forward_pre_hook(lambda _, args, options: calls.append(options), with_kwargs=True)
    return calls


class SecondStep(Callback):
    """Counts the second optimizer step, as the first one creates what later ones reuse."""

    def __init__(self):
        self.parts: dict[str, int] = {}
        self._counter = flop_counter()
        self._calls: list[dict] = []

    def on_step_end(self, trainer, row):
        """Begin after the first step; end after the second."""
        policy = trainer.actor.model.module
        if row["step"] == 1:
            self._calls = record_calls(policy)
            self._counter.__enter__()
        elif row["step"] == 2:
            self._counter.__exit__(None, None, None)
            # Both steps are an epoch each.
            loss_tokens = sum(int(one.mask.sum()) for one in trainer.train_set.samples)
            self.parts = parts_of(policy, list(self._calls), loss_tokens, self._counter.get_total_flops())


def count_trainer(shape: str, work: Path) -> dict[str, int]:
    """:func:`parts_of` for train_pipa on eight sequences of one length."""
    make_model(work / "model", shape, torch.float32)
    write_data(work, equal_problems(8), load_tokenizer(work / "model").eos_token)
    spec = Spec(
        arm="pipa",
        section="equal",
        model=str(work / "model"),
        folder=str(work),
        dtype="fp32",
        checkpointing=False,
        batch_size=8,
        micro_batch_size=4,
        steps_per_round=1,
        max_length=256,
        rank=usual_rank(shape),
        epochs=2,
    )
    counted = SecondStep()
    train(parse("train_pipa", pipa_flags(spec)), [counted])
    return counted.parts


def count_shapes(name: str, length: int = 2048, prompt: int = 512) -> dict[str, int]:
    """:func:`parts_of` for one sequence through a model that has no weights."""
    actor = our_actor(MODELS[name], "sdpa", checkpointing=False)
    calls = record_calls(actor.model)
    loss = our_loss(actor, 1, length, prompt)
    step = count_flops(lambda: loss().backward())
    return parts_of(actor.model, list(calls), length - prompt, step)


def main() -> None:
    """Count, print the table and the verdicts, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="quick", help="of the small model, see inputs.py")
    parser.add_argument("--output", default="benchmarks/results/limit.json")
    options = parser.parse_args()
    print_head()
    with tempfile.TemporaryDirectory() as work:
        counted = {f"{options.shape}, whole trainer": count_trainer(options.shape, Path(work))}
    counted.update((f"{name}, forward and backward", count_shapes(name)) for name in MODELS)
    rows = [[name, *(f"{parts[part] / 1e12:.4f}" for part in PARTS)] for name, parts in counted.items()]
    print_table(["TFLOP", *PARTS], rows)
    for name, parts in counted.items():
        print_ratio(f"{name}: FLOPs / limit", parts["step"] / sum(parts[part] for part in PARTS[:3]), most=MOST)
    write_json(options.output, {"options": vars(options), "counted": counted})


if __name__ == "__main__":
    main()
