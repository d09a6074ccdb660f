"""The least FLOPs that a training step's forward and backward pass can take, and those that steps take.

    python benchmarks/least.py [--output FILE]

The limit is 2b + 2h + a: b one forward pass of the backbone over the *distinct* tokens, h = 2 x hidden x vocabulary a
distinct loss token, and a once more attention's products, both factors of which need a gradient. Beyond it are the
value head, LoRA's weight gradients and whatever is computed twice. train_step.py counts its own trainer against it;
here are models of 7B, which have shapes only and whose step is the policy's forward and backward pass.
"""

import argparse

import torch
from measure import count_flops, flop_counter, print_head, print_ratio, print_table, write_json
from shapes import MODELS, our_actor, our_loss
from torch import nn
from torch.utils.hooks import RemovableHandle

from pipa_openrlhf.model.policy import Policy

MOST = 1.02
PARTS = ("2b", "2h x loss tokens", "a")


def least_parts(policy: Policy, backbone_calls: list[dict], tokens: int, loss_tokens: int) -> dict[str, int]:
    """FLOPs of the limit's parts.

    Args:
        backbone_calls: the arguments of the backbone's forward passes in the step or steps.
        tokens: distinct ones that a model must see; what is seen more often is not in the limit.
        loss_tokens: distinct ones that it must score.
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
    a_token = (sum(counts.values()) - attention) / sum(options["input_ids"].numel() for options in backbone_calls)
    head = 2 * 2 * policy.causal_lm.get_output_embeddings().weight.numel() * loss_tokens
    return dict(zip(PARTS, (round(2 * (a_token * tokens + attention)), head, attention)))


def record_calls(policy: Policy) -> tuple[list[dict], RemovableHandle]:
    """A list that gets the arguments of the backbone's calls until the hook is removed."""
    calls: list[dict] = []

    def record(module, args, options) -> None:
        if torch.is_grad_enabled():
            calls.append(options)

    return calls, policy._backbone[0].register_forward_pre_hook(record, with_kwargs=True)


def count_shapes(name: str, length: int = 2048, prompt: int = 512) -> dict[str, int]:
    """:func:`least_parts` and the step's FLOPs, of one sequence through a model that has no weights."""
    actor = our_actor(MODELS[name], "sdpa", checkpointing=False)
    calls, hook = record_calls(actor.model)
    loss = our_loss(actor, 1, length, prompt)
    step = count_flops(lambda: loss().backward())
    hook.remove()
    return {**least_parts(actor.model, calls, length - 1, length - prompt), "step": step}


def main() -> None:
    """Count, print the table and the verdicts, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/least.json")
    options = parser.parse_args()
    print_head()
    counted = {f"{name}, forward and backward": count_shapes(name) for name in MODELS}
    columns = (*PARTS, "step")
    rows = [[name, *(f"{parts[part] / 1e12:.4f}" for part in columns)] for name, parts in counted.items()]
    print_table(["TFLOP", *columns], rows)
    for name, parts in counted.items():
        print_ratio(f"{name}: FLOPs / limit", parts["step"] / sum(parts[part] for part in PARTS), most=MOST)
    write_json(options.output, {"options": vars(options), "counted": counted})


if __name__ == "__main__":
    main()
