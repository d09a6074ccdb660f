"""PIPA's training step against TRL's and OpenRLHF's on the same sequences: FLOPs, time and peak memory.

    python benchmarks/train_step.py [--quick] [--output FILE]

Every arm is a real trainer in a process of its own; they run in turn, one round at a time, and only one computes at a
time. Two sections: sequences of equal length, where only the method differs, and data as it comes (eight answers a
problem, natural lengths), where everything of ours is on and the others have their best settings that run.
--quick takes a small model and needs minutes; without it the model has SmolLM2-135M's shape and random weights.
"""

import argparse
import math
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from inputs import (
    SHAPES,
    Problem,
    equal_problems,
    expected_sequences,
    load_tokenizer,
    make_model,
    model_size,
    natural_problems,
    read_problems,
    usual_rank,
    whole_batches,
    write_data,
)
from measure import GIB, print_head, print_ratio, print_table, write_json
from turns import Worker, WorkerFailed
from workers import ARMS, Spec

NAMES = {
    "pipa": "PIPA (ours), prior cached",
    "trl_kto": "TRL KTO",
    "trl_kto_precomputed": "TRL KTO precomputed",
    "trl_dpo": "TRL DPO",
    "trl_dpo_precomputed": "TRL DPO precomputed",
    "openrlhf_dpo": "OpenRLHF DPO",
}
# The least cost of a peer / ours that is aimed at.
SECOND_EPOCH = {"trl_kto": 2.3, "trl_kto_precomputed": 1.5, "trl_dpo": 1.5, "openrlhf_dpo": 1.5}
FIRST_RUN = {"trl_kto": 1.65, "trl_dpo": 1.0, "openrlhf_dpo": 1.05}
NATURAL = {"trl_kto": 8.0, "trl_dpo": 4.5, "openrlhf_dpo": 5.0}
NOTES = (
    "Ours is train_pipa whole, with DeepSpeed ZeRO-2 and its value head; the prior pass is timed without its hash of"
    " the weights.",
    "TRL's chunked head is told to skip prompt positions, which it does by itself on CUDA only.",
    "TRL DPO groups by length in the second section; TRL refuses that for KTO.",
    "OpenRLHF on CPU has our replacements for CUDA-only calls, and torch's fused AdamW.",
    "sdpa attention in every arm. TFLOP are those of matrix products and attention (whole squares).",
)
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Plan:
    """What a section runs: sequences, a global batch, a forward pass."""

    section: str
    title: str
    problems: list[Problem]
    batch_size: int
    our_micro_batch_size: int
    micro_batch_size: int
    checkpointing: bool


def main() -> None:
    """Run the sections, print the tables and write the JSON."""
    options = parse_options()
    arms = options.arms.split(",")
    print_head()
    for note in NOTES:
        print(f"- {note}")
    sections = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model or str(work / "model")
        if options.model is None:
            make_model(Path(model), options.shape, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
        for number, plan in enumerate(make_plans(options, load_tokenizer(model))):
            folder = work / str(number)
            folder.mkdir()
            sections.append(run_section(options, plan, arms, model, folder))
        result = {"model": model_size(model), "options": vars(options), "notes": NOTES, "sections": sections}
    write_json(options.output, result)


def parse_options() -> argparse.Namespace:
    """The command line, with defaults that depend on ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small model, three repeats, no gradient checkpointing")
    add("--repeats", type=int, default=None, help="timed rounds of every arm; default 5, quick 3")
    add("--shape", choices=SHAPES, default=None, help="of the random model; default 135m, quick: quick")
    add("--model", default=None, help="folder of a real model instead")
    add("--data", default=None, help="JSONL with prompt, completion, label for the second section; with --model")
    add("--rank", type=int, default=None, help="of LoRA; default: the share of the model that 64 has at width 4096")
    add("--dtype", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32")
    add("--our-micro", type=int, default=16, help="sequences a forward pass in the second section, ours")
    add("--micro", type=int, default=8, help="sequences a forward pass in the second section, the others'")
    add("--only", choices=["equal", "natural"], default=None, help="one section")
    add("--arms", default=",".join(ARMS), help="some of the arms, with commas")
    add("--output", default="benchmarks/results/train_step.json")
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 5)
    options.shape = options.shape or ("quick" if options.quick else "135m")
    options.rank = options.rank or usual_rank(options.shape)
    if options.data and not options.model:
        parser.error("--data needs --model: the tokens are its tokenizer's")
    return options


def make_plans(options: argparse.Namespace, tokenizer) -> list[Plan]:
    """The sections that the options ask for."""
    batch = 8 if torch.cuda.is_available() else 4
    # A step of the quick model is short: three of them are timed together.
    equal = equal_problems(3 * batch if options.quick else batch)
    plans = []
    for checkpointing in (False,) if options.quick else (False, True):
        title = f"Equal lengths, 64 + 192 tokens, gradient checkpointing {'on' if checkpointing else 'off'}"
        plans.append(Plan("equal", title, equal, batch, batch, batch, checkpointing))
    natural = read_problems(options.data, tokenizer, 64) if options.data else natural_problems(64)
    natural = whole_batches(natural, 16)
    source = "real answers" if options.data else "eight answers a problem, natural lengths"
    plans.append(
        Plan("natural", f"Data as it comes, {source}, one pass", natural, 16, options.our_micro, options.micro, False)
    )
    return [plan for plan in plans if options.only in (None, plan.section)]


def run_section(options, plan: Plan, arms: list[str], model: str, folder: Path) -> dict:
    """Start every arm, check that all train on the same, measure in turns, print."""
    tokenizer = load_tokenizer(model)
    write_data(folder, plan.problems, tokenizer.eos_token)
    expected = expected_sequences(plan.problems, tokenizer)
    load_before = os.getloadavg()
    workers, failures = start_workers(options, plan, arms, model, folder, max(total for total, _ in expected.values()))
    try:
        counted, sequences = count_and_ask(workers, failures)
        agreement = check_sequences(expected, sequences, TOLERANCE[options.dtype])
        timed = measure_in_turns(workers, options.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    tokens, loss_tokens = (sum(column) for column in zip(*expected.values()))
    section = {
        "title": plan.title,
        "sequences": len(expected),
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "log_prob_difference": agreement,
        "load": [load_before, os.getloadavg()],
        "counted": counted,
        "timed": timed,
        "failures": failures,
    }
    print_section(plan, section)
    return section


def count_and_ask(workers: dict[str, Worker], failures: dict[str, str]) -> tuple[dict, dict]:
    """Counted rounds of every arm and what it trained on; arms that end here move to ``failures``."""
    counted, sequences = {}, {}
    for arm in list(workers):
        try:
            counted[arm] = {"round": workers[arm].ask("count")}
            if arm == "pipa":
                counted[arm]["prior"] = workers[arm].ask("count prior")
            sequences[arm] = workers[arm].ask("sequences")
        except WorkerFailed as error:
            failures[arm] = str(error)
            workers.pop(arm).close()
    return counted, sequences


def start_workers(options, plan, arms, model, folder, max_length) -> tuple[dict[str, Worker], dict[str, str]]:
    """Workers at the entrance of their loops, and the first line of what went wrong with the others."""
    sequences = sum(len(problem.completions) for problem in plan.problems)
    base = Spec(
        arm="",
        section=plan.section,
        model=model,
        folder=str(folder),
        dtype=options.dtype,
        checkpointing=plan.checkpointing,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        steps_per_round=sequences // plan.batch_size,
        # OpenRLHF wants room for two tokens after the prompt.
        max_length=max_length + 2,
        rank=options.rank,
    )
    ours = replace(base, arm="pipa", micro_batch_size=plan.our_micro_batch_size)
    specs = {arm: ours if arm == "pipa" else replace(base, arm=arm) for arm in arms}
    workers = {arm: Worker(spec, folder / f"{arm}.log") for arm, spec in specs.items()}
    failures = {}
    for arm in arms:
        try:
            workers[arm].read()
        except WorkerFailed as error:
            failures[arm] = str(error)
            workers.pop(arm).close()
    return workers, failures


def check_sequences(expected: dict[str, tuple[int, int]], replies: dict[str, dict], tolerance: float) -> float:
    """Largest relative difference of a sequence's log-prob between two arms.

    Raises:
        SystemExit: an arm trained on other tokens, or its log-probs differ.
    """
    worst = 0.0
    reference = next(iter(replies.values()), {}).get("log_probs", {})
    for arm, reply in replies.items():
        missing = set(expected) - set(reply["log_probs"])
        if missing:
            raise SystemExit(f"{arm}: {len(missing)} of {len(expected)} sequences have other tokens or other prompts")
        mine = [(reply["log_probs"][key], reference[key]) for key in expected]
        if "trained" in reply:
            mine += zip(reply["trained"], sorted(reference[key] for key in expected), strict=True)
        difference = max(abs(one - other) / max(1.0, abs(other)) for one, other in mine)
        if difference > tolerance:
            raise SystemExit(f"{arm}: log-probs differ by {difference:.1e} of their value")
        worst = max(worst, difference)
    return worst


def measure_in_turns(workers: dict[str, Worker], repeats: int) -> dict[str, dict[str, list[dict]]]:
    """Timed rounds of every arm; the order turns round with every repeat."""
    timed = {arm: {"round": [], "prior": []} for arm in workers}
    for repeat in range(repeats):
        for arm in list(workers)[:: -1 if repeat % 2 else 1]:
            timed[arm]["round"].append(workers[arm].ask("round"))
            if arm == "pipa":
                timed[arm]["prior"].append(workers[arm].ask("prior"))
    return timed


def print_section(plan: Plan, section: dict) -> None:
    """Table of the arms, then the ratios."""
    before, after = (load[0] for load in section["load"])
    print(f"\n{plan.title}")
    print(
        f"{section['sequences']} sequences, {section['tokens']} tokens, {section['loss_tokens']} in the loss; "
        f"{plan.batch_size} a step; {plan.our_micro_batch_size} (ours) and {plan.micro_batch_size} (others) a forward "
        f"pass; log-probs of the arms agree to {section['log_prob_difference']:.0e} of their value; "
        f"load {before:.2f} to {after:.2f}"
    )
    rows = []
    for arm, rounds in section["timed"].items():
        rows.append(table_row(NAMES[arm], rounds["round"], section["counted"][arm]["round"]))
        if rounds["prior"]:
            rows.append(table_row("  its prior pass", rounds["prior"], section["counted"][arm]["prior"]))
    if rows:
        print_table(["", "seconds", "min-max", "TFLOP", "peak GiB"], rows)
    for arm, reason in section["failures"].items():
        print(f"{NAMES[arm]} did not run: {reason}")
    if "pipa" not in section["timed"]:
        raise SystemExit("ours did not run: nothing to compare with")
    print("Cost of the peer / ours; of times the ratio of medians (min-max of the rounds' ratios)")
    if plan.section == "natural":
        print_ratios(section, NATURAL, "a pass after the first", with_prior=False, flops_have_targets=False)
    else:
        print_ratios(section, SECOND_EPOCH, "second epoch on", with_prior=False)
        print_ratios(section, FIRST_RUN, "first run, one epoch", with_prior=True)


def table_row(name: str, rounds: list[dict], counted: dict) -> list[str]:
    """One arm in the table."""
    seconds = [one["seconds"] for one in rounds]
    return [
        name,
        f"{statistics.median(seconds):.3f}",
        f"{min(seconds):.3f}-{max(seconds):.3f}",
        f"{counted['flops'] / 1e12:.4f}",
        f"{max(one['peak_bytes'] for one in rounds) / GIB:.2f}",
    ]


def print_ratios(
    section: dict, targets: dict[str, float], when: str, with_prior: bool, flops_have_targets: bool = True
) -> None:
    """FLOPs and time of every peer that ran against ours."""
    counted, timed = section["counted"], section["timed"]
    parts = ("round", "prior") if with_prior else ("round",)
    our_flops = sum(counted["pipa"][part]["flops"] for part in parts)
    our_seconds = [sum(one["seconds"] for one in both) for both in zip(*(timed["pipa"][part] for part in parts))]
    for arm in timed:
        if arm == "pipa" or (with_prior and arm not in targets):
            continue
        target = targets.get(arm)
        flops = counted[arm]["round"]["flops"] / our_flops
        print_ratio(f"{NAMES[arm]}, {when}: FLOPs", flops, least=target if flops_have_targets else None)
        seconds = [one["seconds"] for one in timed[arm]["round"]]
        ratios = [theirs / ours for theirs, ours in zip(seconds, our_seconds, strict=True)]
        median = statistics.median(seconds) / statistics.median(our_seconds)
        print_ratio(f"{NAMES[arm]}, {when}: time", median, (min(ratios), max(ratios)), least=target)
    for arm in targets.keys() & section["failures"].keys():
        print_ratio(f"{NAMES[arm]}, {when}: did not run", math.nan, least=targets[arm])


if __name__ == "__main__":
    main()
