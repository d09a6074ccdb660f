"""On one GPU: the output head alone, and training at 7B with random weights, ours against TRL and OpenRLHF.

    bash benchmarks/gpu.sh [--small] [--minutes M] [--output FILE]

Head: forward and backward of a cross-entropy, in bf16, at Qwen2.5's vocabulary. Training: LoRA 64, gradient
checkpointing, eight answers a problem; every arm is a real trainer in a process of its own, one after another, with
one round to warm up. Tokens are those of the data, whatever an arm computes. Model FLOPs are 4 a weight and token
(forward, and backward to the inputs); tokens that answers share count once where they are computed once. What would
begin after --minutes is left out, and said to be.
"""

import argparse
import importlib.util
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from answers import tokens_left
from inputs import Problem, character_tokenizer, expected_sequences, write_data
from measure import GIB, PeakMemory, first_line, print_head, print_table, synchronize, write_json
from shapes import MODELS, RANK
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from turns import Spec, Worker, WorkerFailed

from pipa_openrlhf.distributed.strategy import free_memory
from pipa_openrlhf.model.output_head import chunk_tokens, single_pass_loss
from pipa_openrlhf.objectives.batch_loss import TokenTerms
from pipa_openrlhf.objectives.sft import sft_token_loss

HEAD = (8192, 4096, 151_936)  # tokens, hidden size, vocabulary
SMALL_HEAD = (48, 32, 512)
SMALL_MODEL = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=10_240
)
ARMS = {"pipa": "PIPA (ours)", "trl_dpo": "TRL DPO", "trl_kto": "TRL KTO", "openrlhf_dpo": "OpenRLHF DPO"}
# Dense bf16, as their maker gives it.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ROUNDS = 2


def main() -> None:
    """Measure and print both tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", action="store_true", help="tiny shapes, to see on any machine that everything runs")
    add("--minutes", type=float, default=7.0, help="after which nothing new begins")
    add("--output", default="benchmarks/results/gpu.json")
    options = parser.parse_args()
    if not (options.small or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device: --small runs tiny shapes on a CPU")
    deadline = time.monotonic() + 60 * options.minutes
    print_head()
    result = {"head": measure_head(*(SMALL_HEAD if options.small else HEAD)), "training": {}}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for name, config in ({"tiny": SMALL_MODEL} if options.small else MODELS).items():
        result["training"][name] = measure_training(name, config, options.small, deadline)
    write_json(options.output, result)


def measure_head(tokens: int, hidden_size: int, vocabulary: int) -> dict:
    """Milliseconds and peak bytes of every way to the loss, with the head's weight trained and frozen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    print(f"\nHead, forward and backward: {tokens} tokens, {hidden_size} x {vocabulary}, bf16")
    measured: dict[str, dict] = {}
    losses, rows = {}, []
    for name, arm in head_arms(hidden, weight, targets).items():
        measured[name] = {}
        for trained in (True, False):
            weight.requires_grad_(trained)
            try:
                losses[name], measured[name]["trained" if trained else "frozen"] = time_head(arm, hidden, weight)
            except Exception as error:  # others' kernels, and memory
                measured[name]["failure"] = first_line(error)
        cells = [measured[name].get(which) for which in ("trained", "frozen")]
        shown = [
            (f"{1000 * one['seconds']:.1f}", f"{one['peak_bytes'] / GIB:.2f}") if one else ("-", "-") for one in cells
        ]
        rows.append([name, *shown[0], *shown[1]])
    print_table(["", "ms, trained", "peak GiB", "ms, frozen", "peak GiB"], rows)
    for name, one in measured.items():
        if "failure" in one:
            print(f"{name} did not run: {one['failure']}")
    compared = [loss for name, loss in losses.items() if loss is not None]
    print(f"Mean losses of all of them: {min(compared):.4f} to {max(compared):.4f}")
    return measured


def head_arms(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor | None]]:
    """By name, a forward and backward pass that returns the sum of the losses, where it computes them."""

    def product() -> None:
        logits = hidden @ weight.T
        logits.backward(logits.detach())

    def plain() -> torch.Tensor:
        loss = functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        loss.backward()
        return loss

    def liger() -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
        loss.backward()
        return loss

    zeros = torch.zeros(len(targets), device=hidden.device)
    terms = TokenTerms(sft_token_loss, zeros, zeros, torch.ones_like(zeros), zeros)

    def ours() -> torch.Tensor:
        size = chunk_tokens(len(weight), free_memory())
        _, loss = single_pass_loss(
            hidden, targets, zeros, terms, lambda part: (part @ weight.T).float(), (weight,), size
        )
        loss.backward()
        return loss

    arms = {"products alone": product, "cross-entropy": plain, "ours": ours}
    return {**arms, "Liger": liger} if importlib.util.find_spec("liger_kernel") else arms


def time_head(arm: Callable, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[float | None, dict]:
    """The mean loss, and the median time and the peak of five calls after two."""
    memory, seconds = PeakMemory(), []
    loss = None
    for number in range(7):
        hidden.grad = weight.grad = None
        if number == 2:
            memory.reset()
        synchronize()
        started = time.perf_counter()
        loss = arm()
        synchronize()
        seconds.append(time.perf_counter() - started)
    mean = None if loss is None else float(loss.detach()) / len(hidden)
    return mean, {"seconds": statistics.median(seconds[2:]), "peak_bytes": memory.peak()}


def make_problems(count: int, prompt: int, answer: int) -> list[Problem]:
    """``count`` prompts with eight answers of log-normal lengths (sigma 0.3); random tokens."""
    rng = random.Random(0)

    def tokens(length: float) -> list[int]:
        return rng.choices(range(26), k=max(int(length), 4))

    return [
        Problem(tokens(prompt), [tokens(answer * rng.lognormvariate(0, 0.3)) for _ in range(8)]) for _ in range(count)
    ]


def measure_training(name: str, config: PretrainedConfig, small: bool, deadline: float) -> dict:
    """Every arm on one model, and the table."""
    problems = make_problems(2, 8, 24) if small else make_problems(4, 128, 384)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = save_random_model(work / "model", config)
        expected = expected_sequences(problems)
        write_data(work, problems)
        tokens, _, distinct = tokens_left(problems)
        base = Spec(
            arm="",
            model=str(work / "model"),
            folder=folder,
            dtype="bf16" if torch.cuda.is_available() else "fp32",
            checkpointing=True,
            batch_size=len(expected) // 2,
            micro_batch_size=8,
            steps_per_round=2,
            max_length=max(one.tokens for one in expected.values()) + 2,
            rank=2 if small else RANK,
        )
        arms, failures = {}, {}
        for arm in ARMS:
            try:
                arms[arm] = run_arm(Spec(**{**vars(base), "arm": arm}), work / f"{arm}.log", deadline)
            except (WorkerFailed, OSError) as error:
                failures[arm] = str(error)
    print(f"\n{name}, {weights:.3g} weights a token")
    print(f"{len(expected)} answers, {tokens} tokens, {len(expected) // 2} answers a step, 8 a forward pass")
    computed = {arm: distinct if arm == "pipa" else tokens for arm in arms}
    print_training(arms, tokens, {arm: 4 * weights * computed[arm] for arm in arms})
    for arm, reason in failures.items():
        print(f"{ARMS[arm]} did not run: {reason}")
    return {"tokens": tokens, "distinct_tokens": distinct, "arms": arms, "failures": failures}


def save_random_model(folder: Path, config: PretrainedConfig) -> int:
    """A model of that shape with the benchmarks' tokenizer; how many weights multiply each token."""
    tokenizer = character_tokenizer()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    on_cuda = torch.cuda.is_available()
    with torch.device("cuda" if on_cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_cuda else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = sum(one.numel() for one in model.parameters()) - model.get_input_embeddings().weight.numel()
    del model
    if on_cuda:
        torch.cuda.empty_cache()
    return count


def run_arm(spec: Spec, log: Path, deadline: float) -> dict[str, list[dict]]:
    """Timed rounds of one arm, and our prior pass.

    Raises:
        WorkerFailed, OSError: it ended, or time was up.
    """
    if time.monotonic() > deadline:
        raise WorkerFailed("out of time")
    worker = Worker(spec, log)
    alarm = threading.Timer(max(deadline - time.monotonic(), 0) + 30, worker.close)
    alarm.start()
    try:
        worker.read()
        worker.ask("round")
        timed = {"round": [worker.ask("round") for _ in range(ROUNDS)]}
        return {**timed, "prior": [worker.ask("prior")]} if spec.arm == "pipa" else timed
    finally:
        alarm.cancel()
        worker.close()


def print_training(arms: dict[str, dict], tokens: int, model_flops: dict[str, int]) -> None:
    """One row an arm: speed, share of the card's arithmetic, memory, and how much longer it takes than ours."""
    seconds = {arm: statistics.median(one["seconds"] for one in timed["round"]) for arm, timed in arms.items()}
    rows = []
    for arm, timed in arms.items():
        peak = max(one["peak_bytes"] for one in timed["round"]) / GIB
        ratio = f"{seconds[arm] / seconds['pipa']:.2f}" if "pipa" in seconds else "-"
        rows.append(
            [
                ARMS[arm],
                f"{tokens / seconds[arm]:.0f}",
                utilisation(model_flops[arm] / seconds[arm]),
                f"{peak:.2f}",
                ratio,
            ]
        )
        for one in timed.get("prior", []):
            rows.append(
                ["  its prior pass", f"{tokens / one['seconds']:.0f}", "", f"{one['peak_bytes'] / GIB:.2f}", ""]
            )
    print_table(["", "tokens/s", "MFU %", "peak GiB", "time / ours"], rows)


def utilisation(flops_a_second: float) -> str:
    """Of the card's dense bf16 arithmetic, in percent; a dash for a card whose figure is not known here."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)
    return f"{100 * flops_a_second / known:.1f}" if known else "-"


if __name__ == "__main__":
    main()
