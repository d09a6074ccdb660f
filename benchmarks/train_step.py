"""PIPA's training against TRL's, OpenRLHF's, ms-swift's and flash-pref's on the same sampled answers.

    bash benchmarks/sample_answers.sh [--gsm8k FOLDER]      (once)
    SWIFT_PYTHON=... FLASH_PREF_PYTHON=... python benchmarks/train_step.py --quick [--write]

Every arm is a real trainer in a process of its own; they run in turn, one pass over the data at a time, and only one
computes at a time. Before anything is timed, their tokens and log-probs are compared. --quick needs less than ten
minutes on two cores; --full has all arms on all data, and gradient checkpointing too. The model is a small random one.
--write puts table and plot into docs/performance.md.
"""

import argparse
import statistics
import tempfile
from datetime import date
from pathlib import Path

import page
import torch
from answers import Data, read_answers
from arms import Section, ratios_of, run_section
from inputs import SHAPES, make_model, model_size
from measure import GIB, command_line, commit, machine, print_head, print_table, write_json
from targets import ARMS, DATA, verdicts

QUICK_ARMS = {
    "words": tuple(ARMS),
    "trees": ("pipa", "pipa_prompts"),
    "gsm8k": ("pipa", "pipa_prompts", "trl_kto", "trl_dpo"),
}
NOTES = (
    "ours is train_pipa whole, with DeepSpeed ZeRO-2 and its value head; the prior pass is timed without its hash of"
    " the weights",
    "TRL's chunked head is told to skip prompt positions, which it does by itself on CUDA only; its DPO groups by"
    " length, its KTO refuses to",
    "OpenRLHF on CPU has our replacements for CUDA-only calls, and torch's fused AdamW",
    "ms-swift and flash-pref want flash attention: on CPU they get torch's, sequence by sequence",
    "sdpa attention in every arm; FLOPs are those of matrix products and attention, whole squares",
)


def main() -> None:
    """Run the sections, print tables and targets, write the JSON and, if asked to, the page."""
    options = parse_options()
    sections = make_sections(options, read_answers(options.answers))
    print_head()
    for note in NOTES:
        print(f"- {note}")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "model")
        make_model(model, options.shape, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
        for section in sections:
            folder = Path(name, section.name)
            folder.mkdir()
            results[section.name] = run_section(options, section, str(model), folder)
            print_section(section, results[section.name])
        size = model_size(model)
    plain, again = ({name: one for name, one in results.items() if one["checkpointing"] is on} for on in (False, True))
    print("\nTargets")
    lines = verdicts(ratios_of(plain), {name: one["of_least"] for name, one in plain.items()})
    print("\n".join(lines))
    result = {"model": size, "options": {**vars(options), "answers": str(options.answers)}, "notes": NOTES}
    write_json(options.output, {**result, "sections": results, "verdicts": lines})
    if options.write:
        write_page(plain, again, lines)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="what the targets need, three repeats: the default")
    add("--full", action="store_true", help="all arms on all data, gradient checkpointing too, five repeats")
    add("--answers", type=Path, default=Path("runs/benchmark_answers"), help="output folder of sample_answers.sh")
    add("--repeats", type=int, default=None, help="timed passes of every arm; default 3, full 5")
    add("--shape", choices=SHAPES, default="quick", help="of the random model")
    add("--dtype", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32")
    add("--our-micro", type=int, default=32, help="sequences a forward pass, ours")
    add("--micro", type=int, default=8, help="sequences a forward pass, the others'")
    add("--only", default=None, help="some of words, trees, gsm8k, words_checkpointing, with commas")
    add("--arms", default=",".join(ARMS), help="some of the arms, with commas")
    add("--write", action="store_true", help="put table and plot into docs/performance.md")
    add("--output", default="benchmarks/results/train_step.json")
    options = parser.parse_args()
    if options.quick and options.full:
        parser.error("--quick or --full, not both")
    options.repeats = options.repeats or (5 if options.full else 3)
    return options


def make_sections(options: argparse.Namespace, found: dict[str, Data]) -> list[Section]:
    """Those that the options ask for."""
    wanted = options.arms.split(",")
    sections = []
    for name, data in found.items():
        arms = tuple(arm for arm in (ARMS if options.full else QUICK_ARMS[name]) if arm in wanted)
        sections.append(Section(data, arms))
    words = sections[0]
    if options.full or (options.only and "words_checkpointing" in options.only):
        sections.append(Section(words.data, words.arms, checkpointing=True))
    return [section for section in sections if not options.only or section.name in options.only.split(",")]


def print_section(section: Section, result: dict) -> None:
    """What was run, and the table of the arms."""
    before, after = (load[0] for load in result["load"])
    print(f"\n{section.data.what}{', gradient checkpointing' if section.checkpointing else ''}")
    for line in (
        f"{result['sequences']} sequences, {result['different_sequences']} of them different",
        f"{result['tokens']} tokens, {result['loss_tokens']} in the loss; left with every prompt once "
        f"{result['left_with_prompts_shared']:.2f}, with every common prefix once {result['left']:.2f}, so also where "
        f"each different answer is there once {result['left_of_different']:.2f}",
        f"{section.data.batch_size} sequences a step; our FLOPs / the least {result['of_least']:.3f}",
        f"log-probs of the arms agree to {result['log_prob_difference']:.0e} of their value",
        f"load {before:.1f} to {after:.1f}",
    ):
        print(f"- {line}")
    ratios = ratios_of({section.name: result})
    rows = []
    for arm, rounds in result["timed"].items():
        times, flops = [], []
        for first in (False, True):
            ratio = ratios.get((section.data.name, arm, first))
            times.append("" if ratio is None else f"{ratio.seconds:.2f}")
            flops.append("" if ratio is None else f"{ratio.flops:.2f}")
        rows.append([*table_row(ARMS[arm], rounds["round"], result["counted"][arm]["round"]), *times, *flops])
        if arm == "pipa":
            row = table_row("  its prior pass", rounds["prior"], result["counted"][arm]["prior"])
            rows.append([*row, *[""] * 4])
    headings = ["", "seconds", "min-max", "TFLOP", "peak GiB", "time/ours", "first", "FLOPs/ours", "first"]
    print_table(headings, rows)
    for arm, reason in result["failures"].items():
        print(f"{ARMS[arm]} did not run: {reason}", flush=True)


def table_row(name: str, rounds: list[dict], counted: dict) -> list[str]:
    """One arm's own figures."""
    seconds = [one["seconds"] for one in rounds]
    return [
        name,
        f"{statistics.median(seconds):.3f}",
        f"{min(seconds):.3f}-{max(seconds):.3f}",
        f"{counted['flops'] / 1e12:.4f}",
        f"{max(one['peak_bytes'] for one in rounds) / GIB:.2f}",
    ]


def write_page(plain: dict[str, dict], again: dict[str, dict], lines: list[str]) -> None:
    """Table, plot and verdicts of what was run; the page keeps its other blocks."""
    where = machine()
    head = f"`{command_line()}`, commit {commit()}, {date.today()}, {where['cpu']}, {where['cores']} cores."
    blocks, svg = {}, None
    if "words" in plain:
        ratios = ratios_of(plain)
        left = ", ".join(f"{DATA[name]} {one['left']:.2f}" for name, one in plain.items())
        words = plain["words"]
        shared = (
            f"Tokens left with every common prefix once: {left}. Of the {words['sequences']} answers to word problems"
            f" {words['different_sequences']} differ; where each of those is there once,"
            f" {words['left_of_different']:.2f} of the tokens are left."
        )
        blocks["table"] = f"{head}\n\n{page.table(ratios)}\n\n{shared}"
        blocks["targets"] = "```\n" + "\n".join(lines) + "\n```"
        svg = page.picture(ratios)
        page.write({"cost": f"{page.sentence(ratios)}\n{head}"}, None, page.README)
    if again:
        blocks["checkpointing"] = f"{head}\n\n{page.table(ratios_of(again))}"
    page.write(blocks, svg)


if __name__ == "__main__":
    main()
