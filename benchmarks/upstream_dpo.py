"""OpenRLHF's own train_dpo and ours on the same tokens: the losses of 20 steps side by side.

    python benchmarks/upstream_dpo.py [--model FOLDER] [--steps 20]

Both run in bf16, ZeRO-2, one rank, without dropout, in upstream's sample order. bf16 runs of the very same
computation differ by rounding; how much is shown by a second run of ours that cuts the batch into other micro-batches.
Without --model, a small random Llama is made on the spot. On CPU, upstream's strategy gets our replacements for its
CUDA-only calls, and both use torch's AdamW; nothing else of upstream is changed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import run_openrlhf_dpo

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8


def run_upstream(argv: list[str], log: str) -> None:
    """In this process: ``openrlhf.cli.train_dpo`` with ``argv``; the loss of every optimizer step goes to ``log``."""

    def record(step: int, logs: dict) -> None:
        with open(log, "a") as file:
            file.write(json.dumps({"step": step, "loss": logs["loss_mean"]}) + "\n")

    run_openrlhf_dpo(argv, record)


def make_data(path: Path, pairs: int) -> None:
    """Message pairs, so that upstream's space before eos does not come into play."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(pairs):
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            question = {"role": "user", "content": f"What is {a} + {b}?"}
            answers = [{"role": "assistant", "content": f"{a} + {b} = {value}"} for value in (a + b, a + b + 7)]
            file.write(json.dumps({"chosen": [question, answers[0]], "rejected": [question, answers[1]]}) + "\n")


def make_model(folder: Path) -> None:
    """A small random Llama with a byte-level tokenizer, as the tests use."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.make_model(
        0, hidden_size=64, intermediate_size=128, num_hidden_layers=4, initializer_range=0.05
    ).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)


def losses(path: Path) -> list[float]:
    """Loss of every step in a metrics file."""
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def main() -> None:
    """Run upstream once and ours twice, and print the three curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", default="5e-4")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model or str(work / "model")
        if options.model is None:
            make_model(Path(model))
        make_data(work / "pairs.jsonl", BATCH * options.steps)
        common = (
            f"--model.model_name_or_path {model} --data.dataset {work / 'pairs.jsonl'} --data.apply_chat_template "
            f"--ds.param_dtype bf16 --ds.zero_stage 2 --ds.attn_implementation sdpa --train.batch_size {BATCH} "
            f"--adam.lr {options.lr} --train.max_epochs 1 --data.max_len 256"
        ).split()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}

        def run(command: list[str]) -> None:
            subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)

        upstream_flags = [*common, "--train.micro_batch_size", "4", "--ckpt.output_dir", str(work / "upstream")]
        run([__file__, "--upstream", str(work / "upstream.jsonl"), *upstream_flags])
        for label, micro in (("ours", "4"), ("again", "2")):
            where = ["--ckpt.output_dir", str(work / label), "--prior.cache_dir", str(work / f"cache_{label}")]
            run(["-m", "pipa_openrlhf.cli.train_dpo", *common, "--train.micro_batch_size", micro, *where])
        report(
            losses(work / "upstream.jsonl"),
            losses(work / "ours" / "metrics.jsonl"),
            losses(work / "again" / "metrics.jsonl"),
        )


def report(upstream: list[float], ours: list[float], again: list[float]) -> None:
    """One line a step, and the largest differences."""
    print("step   OpenRLHF      ours   ours, other micro-batches")
    for step, values in enumerate(zip(upstream, ours, again, strict=True), start=1):
        print(f"{step:4d}  {values[0]:9.5f} {values[1]:9.5f} {values[2]:9.5f}")
    to_upstream = max(abs(one - other) for one, other in zip(upstream, ours))
    noise = max(abs(one - other) for one, other in zip(ours, again))
    print(f"largest difference: ours to OpenRLHF {to_upstream:.5f}, between our two bf16 runs {noise:.5f}")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--upstream":
        run_upstream(sys.argv[3:], sys.argv[2])
    else:
        main()
