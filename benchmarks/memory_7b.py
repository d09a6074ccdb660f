"""Memory of a training step at 7B, without weights, and the same estimate against measured small runs.

    python benchmarks/memory_7b.py [--quick]

The step runs on the meta device: our policy with the single-pass loss of PIPA-M, and OpenRLHF's DPO through its own
model and trainer code. Every tensor that is alive is counted, temporaries included (live_bytes.py); attention and
flash-attn's cross-entropy are stand-ins that allocate what those kernels allocate. Weights, gradients and optimizer
are counted as DeepSpeed keeps them (memory_states.py). Not in it: what an allocator rounds up or leaves unused, the
accelerator's context, and communication between ranks, the gradient bucket apart.

The check measures real runs of both, whole command lines in fresh processes (memory_check.py).
"""

import argparse
from dataclasses import asdict, replace

from measure import GIB, describe_machine, print_ratio, print_table, write_json
from memory_check import MIB, check
from memory_states import HALF, our_bucket, states, upstream_bucket
from memory_steps import Step, StepBytes, deepseek_math_7b, openrlhf_dpo_step, our_step, qwen_math_7b

MOST_AT_7B, MOST_MEASURED = 0.55, 0.5
# Config, and the peak by hand in GiB: weights, adapters with Adam, checkpoints, one layer, one chunk of the head.
MODELS = {"DeepSeek-Math-7B": (deepseek_math_7b, 14), "Qwen2.5-Math-7B": (qwen_math_7b, 16)}
CHECKS = [("small", 8, 512, True), ("135m", 8, 512, True), ("135m", 8, 512, False)]
QUICK_CHECKS = [("small", 4, 256, True)]
JUDGED = ("135m", 8, 512, True)


def one_sequence(name: str, step: Step, floor: int) -> dict:
    """Where the memory of our step goes: one sequence, LoRA, ZeRO-2, one rank."""
    columns = {}
    for checkpointing in (True, False):
        found = our_step(replace(step, checkpointing=checkpointing))
        columns[_setting(checkpointing)] = {**_parts(found, our_bucket(found.trained)), "largest": found.largest}
    print(f"\n{name}: PIPA-M, LoRA rank {step.lora_rank}, one sequence of {step.length}, ZeRO-2, one rank (GiB)")
    _print_parts(columns)
    print(f"floor by hand, with checkpointing: about {floor} GiB")
    return columns


def against_dpo(name: str, step: Step) -> dict:
    """Ours and OpenRLHF's DPO on the two sequences of one pair."""
    result = {}
    for checkpointing in (True, False):
        pair = replace(step, sequences=2, checkpointing=checkpointing)
        ours = our_step(pair)
        arms = {
            "ours": _parts(ours, our_bucket(ours.trained)),
            "OpenRLHF DPO": _parts(openrlhf_dpo_step(pair, flash_attn_loss=True), upstream_bucket()),
            "DPO, no flash-attn": _parts(openrlhf_dpo_step(pair, flash_attn_loss=False), upstream_bucket()),
        }
        print(f"\n{name}: one pair, 2 x {step.length} tokens, {_setting(checkpointing)}, ZeRO-2, one rank (GiB)")
        _print_parts(arms)
        ratio = arms["ours"]["peak"] / min(arms["OpenRLHF DPO"]["peak"], arms["DPO, no flash-attn"]["peak"])
        print_ratio("ours / OpenRLHF DPO, peak memory", ratio, most=MOST_AT_7B if checkpointing else None)
        result[_setting(checkpointing)] = {**arms, "ratio": ratio}
    return result


def over_ranks(name: str, step: Step) -> list[dict]:
    """Peak of a rank under ZeRO stages and numbers of ranks, with one pair a rank and checkpointing."""
    lora, full = replace(step, sequences=2), replace(step, sequences=2, lora_rank=0)
    arms = {
        "ours, LoRA": our_step(lora),
        "DPO, LoRA": openrlhf_dpo_step(lora, flash_attn_loss=True),
        "ours, full": our_step(full),
        "DPO, full": openrlhf_dpo_step(full, flash_attn_loss=True),
    }
    rows = []
    for stage, ranks in [(0, 1), *((stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 4, 8))]:
        found = {}
        for arm, found_step in arms.items():
            bucket = our_bucket(found_step.trained) if arm.startswith("ours") else upstream_bucket()
            of_rank = states(found_step, stage, ranks, bucket)
            found[arm] = {**asdict(of_rank), "peak": of_rank.peak(found_step)}
        rows.append({"stage": stage, "ranks": ranks, "arms": found})
    print(
        f"\n{name}: peak of a rank, one pair a rank, with checkpointing (GiB); in brackets weights + masters and Adam"
    )
    print_table(["ZeRO", "ranks", *arms], [_rank_cells(row) for row in rows])
    return rows


def report_check(rows: list[dict]) -> None:
    """Estimate and measurement side by side, and the measured ratio of the two arms."""
    print("\nEstimate and measured peak of a real step: bf16, LoRA rank 64, ZeRO-2, one rank (MiB)")
    headings = ["model", "batch", "", "arm", "estimate", "measured", "error"]
    print_table(headings, [_check_cells(row) for row in rows])
    process = {row["arm"]: f"{row['process'] / MIB:.0f}" for row in rows}
    print(f"measured: above the imports and what a process takes with a model of no size, {process} MiB")
    print("malloc returns freed memory at once, for both arms alike (memory_check.ALLOCATOR)")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        ratio = (ours["measured"] + ours["process"]) / (theirs["measured"] + theirs["process"])
        judged = (ours["model"], ours["sequences"], ours["length"], ours["checkpointing"]) == JUDGED
        what = f"ours / OpenRLHF DPO, {ours['model']}, {_setting(ours['checkpointing'])}, measured"
        print_ratio(what, ratio, most=MOST_MEASURED if judged else None)


def _parts(step: StepBytes, bucket: int) -> dict[str, int]:
    found = states(step, stage=2, ranks=1, bucket=bucket)
    gradients = found.bucket + found.gradients
    parts = {
        "weights": HALF * (step.frozen + step.trained),
        "weights of a second model": HALF * step.other,
        "float32 masters and Adam": found.optimizer,
        "kept for the backward pass": step.kept,
        "gradient bucket at the peak": gradients if step.after_gradients + gradients > step.before_gradients else 0,
    }
    peak = found.peak(step)
    return {**parts, "temporary at the peak": peak - sum(parts.values()), "peak": peak}


def _print_parts(columns: dict[str, dict]) -> None:
    names = [name for name in next(iter(columns.values())) if name != "largest"]
    print_table(["", *columns], [[name, *(_gib(column[name]) for column in columns.values())] for name in names])


def _rank_cells(row: dict) -> list[str]:
    cells = [f"{_gib(arm['peak'])} ({_gib(arm['weights'] + arm['optimizer'])})" for arm in row["arms"].values()]
    return [str(row["stage"]), str(row["ranks"]) if row["stage"] else "any", *cells]


def _check_cells(row: dict) -> list[str]:
    setting = [row["model"], f"{row['sequences']} x {row['length']}", _setting(row["checkpointing"]), row["arm"]]
    sizes = [f"{row[name] / MIB:.0f}" for name in ("estimate", "measured")]
    return [*setting, *sizes, f"{row['estimate'] / row['measured'] - 1:+.1%}"]


def _setting(checkpointing: bool) -> str:
    return "checkpointing" if checkpointing else "no checkpointing"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def main() -> None:
    """Estimate both models, measure the small ones, print and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check on a small model only, within three minutes")
    parser.add_argument("--output", default="benchmarks/results/memory_7b.json")
    options = parser.parse_args()
    print(describe_machine())
    result = {"models": {}}
    for name, (config, floor) in MODELS.items():
        step = Step(config())
        result["models"][name] = {
            "one sequence": one_sequence(name, step, floor),
            "one pair": against_dpo(name, step),
            "ranks": over_ranks(name, step),
        }
    result["check"] = check(QUICK_CHECKS if options.quick else CHECKS)
    report_check(result["check"])
    write_json(options.output, result)


if __name__ == "__main__":
    main()
