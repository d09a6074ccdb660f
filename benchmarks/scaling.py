"""How the cost of our forward and backward pass grows with length, batch, vocabulary and answers a prompt.

    python benchmarks/scaling.py [--quick]

A random Llama of fixed shape with LoRA and value head; loss and gradient of PIPA-M, no optimizer and no DeepSpeed.
Peak memory is that of all tensors alive beside the weights (live_bytes.py; memory_7b.py checks such counts against
measured runs). FLOPs count attention without regard to its causal mask. Per token means per token of the sequences as
they are, each with its own prompt, however few tokens are computed.
"""

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, storages_of
from measure import count_flops, describe_machine, print_table, synchronize, write_json
from memory_steps import Step, llama, our_actor

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.losses.objectives import objectives
from pipa_openrlhf.losses.reduction import count_batch
from pipa_openrlhf.models.policy import PolicyActor
from pipa_openrlhf.trainer.batch_loss import BatchLoss, LossSettings

SINGLE_PASS, RECOMPUTED, PLAIN = "single pass", "chunks, recomputed", "plain"
MIB, KIB = 2**20, 2**10


@dataclass(frozen=True)
class Point:
    """One measured setting; a quarter of every sequence is prompt.

    Attributes:
        head: ``SINGLE_PASS``: loss and gradient in one pass over chunks; ``RECOMPUTED``: log-probs in chunks, the
            logits computed again in the backward pass; ``PLAIN``: all logits at once, ordinary autograd.
        answers: sequences that have the same prompt.
    """

    sequences: int
    length: int = 512
    vocabulary: int = 32000
    head: str = SINGLE_PASS
    answers: int = 1
    shares_prompts: bool = False


def axes(quick: bool) -> dict[str, list[Point]]:
    """Points by axis. Length has the same number of tokens in every batch."""
    tokens = 1024 if quick else 4096
    lengths = (256, 512, 1024) if quick else (256, 512, 1024, 2048, 4096)
    batches = (1, 2, 4) if quick else (1, 2, 4, 8, 16)
    vocabularies = (32000, 152064) if quick else (32000, 64000, 102400, 152064)
    heads = (SINGLE_PASS, PLAIN) if quick else (SINGLE_PASS, RECOMPUTED, PLAIN)
    answers = (1, 8) if quick else (1, 2, 4, 8)
    sharing = [(count, shares) for count in answers for shares in (False, True)]
    return {
        "sequence length": [Point(tokens // length, length) for length in lengths],
        "batch size": [Point(batch) for batch in batches],
        "vocabulary": [Point(2 if quick else 4, 512, size, head) for size in vocabularies for head in heads],
        "answers a prompt": [Point(8, 256, answers=count, shares_prompts=shares) for count, shares in sharing],
    }


def measure_point(point: Point, shape: tuple[int, ...], lora_rank: int, checkpointing: bool, repeats: int) -> dict:
    """Time, FLOPs and peak bytes of one forward and backward pass; ``shape`` is that of a Llama, vocabulary apart."""
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    torch.manual_seed(0)
    step = Step(llama(*shape, point.vocabulary), dtype, lora_rank=lora_rank, checkpointing=checkpointing)
    actor = our_actor(step, device).train()
    samples = make_samples(point)
    work = _pass(actor, samples, collate_point(samples, point).to(torch.device(device)), point)

    with LiveBytes(storages_of(actor)) as live:
        work()
    flops = count_flops(work)
    seconds = [_seconds(work) for _ in range(repeats)]
    return {**asdict(point), "seconds": seconds, "flops": flops, "peak_bytes": live.peak, "load": os.getloadavg()[0]}


def collate_point(samples: list[Sample], point: Point) -> Batch:
    """The micro-batch of a point."""
    return collate(samples, None, 0, "shared" if point.shares_prompts else "padded")


def make_samples(point: Point) -> list[Sample]:
    """Random sequences, ``point.answers`` to a prompt, right and wrong in turn."""
    rng = np.random.default_rng(0)
    prompt_len = point.length // 4
    samples = []
    for index in range(point.sequences):
        if index % point.answers == 0:
            prompt = rng.integers(point.vocabulary, size=prompt_len, dtype=np.int32)
        answer = rng.integers(point.vocabulary, size=point.length - prompt_len, dtype=np.int32)
        ones = np.ones(len(answer), dtype=np.int8)
        samples.append(
            Sample(
                input_ids=np.concatenate([prompt, answer]),
                prompt_len=prompt_len,
                labels=ones * (index % 2),
                mask=ones,
                step_ids=np.zeros(len(answer), dtype=np.int32),
                answer_label=index % 2,
                problem_id=str(index // point.answers),
                pair_id=None,
                where="",
            )
        )
    return samples


def _pass(actor: PolicyActor, samples: list[Sample], batch: Batch, point: Point):
    batch_loss = BatchLoss(objectives()["pipa_m"], LossSettings())
    counts = count_batch([(one.labels, one.mask, one.answer_label) for one in samples])
    if point.head == PLAIN:
        head = actor.model._output_head[0]
        actor.model._output_head[0] = lambda hidden, targets: (
            -F.cross_entropy(head(hidden).float(), targets, reduction="none")
        )

    def work() -> None:
        terms = batch_loss.token_terms(batch, counts) if point.head == SINGLE_PASS else None
        output = actor(batch, terms)
        batch_loss.share(output, batch, counts, output.log_f.new_zeros(())).backward()
        actor.zero_grad(set_to_none=True)

    return work


def _seconds(work) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def print_axis(name: str, rows: list[dict]) -> None:
    """One table."""
    print(f"\n{name}")
    print_table(
        [*_SETTINGS[name][0], "seconds", "spread", "us/token", "MFLOP/token", "peak MiB", "KiB/token"],
        [[*_SETTINGS[name][1](row), *_cells(row)] for row in rows],
    )


# The columns that tell an axis's points apart.
_SETTINGS = {
    "sequence length": (["length", "batch"], lambda row: [str(row["length"]), str(row["sequences"])]),
    "batch size": (["batch", "length"], lambda row: [str(row["sequences"]), str(row["length"])]),
    "vocabulary": (["vocabulary", "head"], lambda row: [str(row["vocabulary"]), row["head"]]),
    "answers a prompt": (
        ["answers", "prompt"],
        lambda row: [str(row["answers"]), "shared" if row["shares_prompts"] else "repeated"],
    ),
}


def _cells(row: dict) -> list[str]:
    tokens = row["sequences"] * row["length"]
    middle = statistics.median(row["seconds"])
    return [
        f"{middle:.2f}",
        f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f}",
        f"{middle / tokens * 1e6:.0f}",
        f"{row['flops'] / tokens / 1e6:.1f}",
        f"{row['peak_bytes'] / MIB:.0f}",
        f"{row['peak_bytes'] / tokens / KIB:.0f}",
    ]


def main() -> None:
    """Measure every axis, print the tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few points, within three minutes")
    parser.add_argument("--output", default="benchmarks/results/scaling.json")
    options = parser.parse_args()
    print(describe_machine())
    shape = (options.hidden, options.intermediate, options.layers, options.heads, options.heads)
    result = {"options": vars(options), "axes": {}}
    for name, points in axes(options.quick).items():
        result["axes"][name] = [
            measure_point(point, shape, options.lora_rank, options.checkpointing, options.repeats) for point in points
        ]
        print_axis(name, result["axes"][name])
    write_json(options.output, result)


if __name__ == "__main__":
    main()
