"""How far a training step is from the least that its forward and backward pass can cost.

    python benchmarks/limit.py [--quick] [--output FILE]

Time: the real trainer's whole optimizer step (DeepSpeed, data loading, metrics, update) against the bare forward and
backward pass of a second copy of the same module on the same micro-batches, in turns.
FLOPs: a counted step against 2b + 2h x share of loss tokens, with b one forward pass of the backbone, LoRA attached,
and h = 2 x hidden x vocabulary a token; for the model measured, and, without weights, for two of 7B.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from inputs import SHAPES, equal_problems, load_tokenizer, make_model, model_size, usual_rank, write_data
from measure import (
    count_flops,
    describe_machine,
    flop_counter,
    print_ratio,
    print_table,
    synchronize,
    write_json,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from workers import Spec, pipa_flags

from pipa_openrlhf.cli import train_pipa
from pipa_openrlhf.cli.args import parse_args
from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.losses.objectives import ObjectiveSettings, objectives
from pipa_openrlhf.losses.reduction import count_batch
from pipa_openrlhf.losses.token_terms import TokenTerms
from pipa_openrlhf.models.build import build_policy
from pipa_openrlhf.models.policy import Policy, PolicyActor, add_lora
from pipa_openrlhf.models.value_head import ValueHead
from pipa_openrlhf.trainer.batch_loss import BatchLoss, LossSettings
from pipa_openrlhf.trainer.preference_trainer import PreferenceTrainer

MOST_TIME, MOST_FLOPS = 1.10, 1.03
# Relative, of loss and gradient norm: DeepSpeed and autograd add up bf16 gradients in their own ways.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
# Both operands of its products need a gradient, which 2b does not allow for; kernels also compute the scores again.
ATTENTION = "attention backward beyond one forward"
BIG = {
    "DeepSeek-Math-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=30,
        num_attention_heads=32,
        vocab_size=102400,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-Math-7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}
MicroBatches = list[tuple[Batch, TokenTerms]]


class Finished(Exception):
    """Enough steps were measured; leaves the trainer's loop."""


class StepAgainstBare:
    """Stands at the end of every step of the real loop and runs the bare pass there."""

    def __init__(self, repeats: int, tolerance: float):
        self.repeats = repeats
        self.tolerance = tolerance
        self.step_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.step_flops = 0
        self.parts: dict[str, float] = {}
        self._bare: PolicyActor | None = None
        self._last: tuple[dict, list[Sample], list] | None = None
        self._counter: FlopCounterMode | None = None
        self._steps = 0
        self._started = 0.0

    def install(self) -> None:
        """Hook into the trainer."""
        train_step, save_if_due = PreferenceTrainer._train_step, PreferenceTrainer._save_if_due

        def remember(trainer, units, step, stop):
            row, stopping = train_step(trainer, units, step, stop)
            samples = [trainer.train_set.samples[index] for index in trainer.train_set.rows(units)]
            self._last = (row, samples, step.answers)
            return row, stopping

        def step_done(trainer, stopping):
            save_if_due(trainer, stopping)
            self._step_done(trainer)

        PreferenceTrainer._train_step, PreferenceTrainer._save_if_due = remember, step_done

    def _step_done(self, trainer: PreferenceTrainer) -> None:
        # Step 1 creates what later ones reuse; the last one has its FLOPs counted.
        synchronize()
        seconds = time.perf_counter() - self._started
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
        row, samples, micro_batches = self._last
        counts = count_batch([(one.labels, one.mask, one.answer_label) for one in samples])
        batches = [one.batch.to(device()) for one in micro_batches]
        work = [(batch, trainer.loss.token_terms(batch, counts)) for batch in batches]
        if self._bare is None:
            self._bare = _copy_of(trainer)
        bare_seconds = self._run_bare(work, row)
        if 1 <= self._steps <= self.repeats:
            self.step_seconds.append(seconds)
            self.bare_seconds.append(bare_seconds)
        if self._counter is not None:
            self.step_flops = self._counter.get_total_flops()
            self.parts = parts_of(self._bare, work)
            raise Finished
        self._steps += 1
        if self._steps > self.repeats:
            self._counter = flop_counter()
            self._counter.__enter__()
        self._started = time.perf_counter()

    def _run_bare(self, work: MicroBatches, row: dict) -> float:
        synchronize()
        started = time.perf_counter()
        loss = forward_and_backward(self._bare, work)
        synchronize()
        seconds = time.perf_counter() - started
        gradients = [one.grad for one in self._bare.parameters() if one.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        for name, mine, theirs in (("loss", loss, row["loss"]), ("gradient norm", norm, row["grad_norm"])):
            if not math.isclose(mine, theirs, rel_tol=self.tolerance):
                raise SystemExit(f"the bare pass has another {name} than the step: {mine} and {theirs}")
        self._bare.zero_grad(set_to_none=True)
        return seconds


def _copy_of(trainer: PreferenceTrainer) -> PolicyActor:
    config = trainer.strategy.get_ds_train_config()
    actor = build_policy(trainer.args, True, None, False, config).to(device()).train()
    actor.model.load_state_dict(trainer.actor.model.module.state_dict())
    return actor


def forward_and_backward(actor: PolicyActor, work: MicroBatches) -> float:
    """Add the gradients of a global batch and return its loss."""
    losses = []
    for batch, terms in work:
        loss = actor(batch, terms).loss
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
    return 0.0 if total.is_meta else float(total)


def parts_of(actor: PolicyActor, work: MicroBatches) -> dict[str, float]:
    """Counted FLOPs of the bare pass, and what they are spent on beside 2b + 2h x loss tokens."""
    policy = actor.model
    # The module keeps its backbone and its output head in lists, so that they are not registered twice.
    backbone, output_head = policy._backbone[0], policy._output_head[0]

    @torch.no_grad()
    def backbone_forward() -> None:
        for batch, _ in work:
            backbone(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )

    def whole() -> None:
        forward_and_backward(actor, work)
        actor.zero_grad(set_to_none=True)

    forward, total = _counts(backbone_forward), _counts(whole)
    adapters = sum(one.numel() for name, one in policy.named_parameters() if "lora_" in name)
    tokens = sum(batch.input_ids.numel() for batch, _ in work)
    value_head, policy.value_head = policy.value_head, None
    without_value_head = count_flops(whole)
    policy.value_head = value_head
    loss_tokens = sum(len(batch.targets) for batch, _ in work)
    parts = {
        "2b": 2 * sum(forward.values()),
        "2h": 2 * 2 * output_head.weight.numel() * loss_tokens,
        "LoRA weight gradients": 2 * adapters * tokens,
        "value head": sum(total.values()) - without_value_head,
        ATTENTION: _attention(total) - 2 * _attention(forward),
    }
    return {**parts, "anything else": sum(total.values()) - sum(parts.values())}


def _counts(work) -> dict:
    with flop_counter() as counter:
        work()
    return counter.get_flop_counts()["Global"]


def _attention(counts: dict) -> int:
    return sum(flops for kernel, flops in counts.items() if "attention" in str(kernel) or "bmm" in str(kernel))


def count_big(config: LlamaConfig | Qwen2Config, tokens: int = 2048, prompt_share: float = 0.25) -> dict[str, float]:
    """:func:`parts_of` for one sequence through a model that exists as shapes only."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        lm = add_lora(lm, 64, 64, "all-linear", 0.0)
        head = ValueHead(config.hidden_size, config.hidden_size, torch.bfloat16)
        actor = PolicyActor(Policy(lm, head)).train()
    answer = tokens - int(tokens * prompt_share)
    ones = np.ones(answer, dtype=np.int8)
    ids = np.zeros(tokens, dtype=np.int32)
    sample = Sample(ids, tokens - answer, ones, ones, ones.astype(np.int32) - 1, 1, "", None, "")
    batch = collate([sample], None, 0, "packed")
    # With a mask of its own the model asks nothing about values, which a shape cannot answer.
    mask = torch.empty(1, 1, *(2 * [batch.input_ids.shape[1]]), dtype=torch.bfloat16)
    counts = count_batch([(sample.labels, sample.mask, sample.answer_label)])
    terms = BatchLoss(objectives(ObjectiveSettings())["pipa_m"], LossSettings()).token_terms(batch, counts)
    moved = TokenTerms(terms.token_loss, *(one.to("meta") for one in _tensors(terms)))
    return parts_of(actor, [(replace(batch, attention_mask=mask).to(torch.device("meta")), moved)])


def _tensors(terms: TokenTerms) -> tuple[torch.Tensor, ...]:
    return terms.log_p, terms.labels, terms.weights, terms.nll_weights


def print_parts(name: str, parts: dict[str, float], step: float) -> None:
    """Where the FLOPs of a step go, as shares of the limit, and the verdict."""
    limit = parts["2b"] + parts["2h"]
    labels = {"2b": "backbone, forward and input gradients (2b)", "2h": "output head (2h x share of loss tokens)"}
    rows = [[labels.get(part, part), f"{flops / 1e12:.4f}", f"{flops / limit:.2%}"] for part, flops in parts.items()]
    rows.append(["the trainer around it", f"{(step - sum(parts.values())) / 1e12:.4f}", ""])
    print(f"\n{name}")
    print_table(["where a step's FLOPs go", "TFLOP", "of the limit"], rows)
    print_ratio("counted FLOPs of a step / limit", step / limit, most=MOST_FLOPS)
    attention = parts[ATTENTION]
    print_ratio("the same, attention's whole backward in the limit", step / (limit + attention))


def main() -> None:
    """Measure, count, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small model and seven repeats; otherwise 135m and nine")
    add("--shape", choices=SHAPES, default=None)
    add("--repeats", type=int, default=None)
    add("--dtype", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32")
    add("--output", default="benchmarks/results/limit.json")
    options = parser.parse_args()
    shape = options.shape or ("quick" if options.quick else "135m")
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        comparison, size = measure(options, shape, Path(name))
    steps, bares = comparison.step_seconds, comparison.bare_seconds
    rank = usual_rank(shape)
    print(f"\n{shape} shape, LoRA rank {rank}, {len(steps)} repeats, load {os.getloadavg()[0]:.2f}")
    rows = [
        [what, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}-{max(seconds):.3f}"]
        for what, seconds in (("trainer's step", steps), ("bare forward and backward", bares))
    ]
    print_table(["", "seconds", "min-max"], rows)
    ratios = [one / other for one, other in zip(steps, bares, strict=True)]
    print_ratio("time of a step / bare", statistics.median(ratios), (min(ratios), max(ratios)), most=MOST_TIME)
    print_parts(f"{shape} shape, 64 + 192 tokens", comparison.parts, comparison.step_flops)
    big = {model: count_big(config) for model, config in BIG.items()}
    for model, parts in big.items():
        print_parts(f"{model}, one sequence of 512 + 1536 tokens, LoRA rank 64", parts, sum(parts.values()))
    result = {"model": size, "options": vars(options), "rank": rank, "step_seconds": steps, "bare_seconds": bares}
    write_json(options.output, {**result, "step_flops": comparison.step_flops, "parts": comparison.parts, "big": big})


def measure(options: argparse.Namespace, shape: str, work: Path) -> tuple[StepAgainstBare, dict]:
    """Run train_pipa on equal lengths with the comparison in its loop."""
    make_model(work / "model", shape, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    write_data(work, equal_problems(8), load_tokenizer(work / "model").eos_token)
    spec = Spec(
        arm="pipa",
        section="equal",
        model=str(work / "model"),
        folder=str(work),
        dtype=options.dtype,
        checkpointing=False,
        batch_size=8,
        micro_batch_size=4,
        steps_per_round=1,
        max_length=256,
        rank=usual_rank(shape),
    )
    comparison = StepAgainstBare(options.repeats or (7 if options.quick else 9), TOLERANCE[options.dtype])
    comparison.install()
    try:
        train_pipa.main(parse_args("train_pipa", pipa_flags(spec)))
    except Finished:
        pass
    return comparison, model_size(work / "model")


if __name__ == "__main__":
    main()
