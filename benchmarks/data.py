"""Reading and tokenising step-labelled rows, beside a bare ``datasets.map`` with the same tokenizer on the same texts.

python benchmarks/data.py --model MODEL [--rows 20000]

Each side runs in a process of its own, one after the other. Both read the same JSON Lines file and end with the token
ids of every row in memory or in a memory-mapped file; ours also has a label, a mask and a step for every token of the
answer, and has checked each row. Memory is what the process has grown by at its peak.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import ROOT
from measure import print_head

SIDES = ("ours", "datasets.map")


def write_rows(path: Path, count: int) -> None:
    """Step-labelled rows of about 370 tokens, no two of them equal."""
    words = "the sum of each apple and then we add seven more to it so that there are left in all".split()
    draw = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            steps = [
                f"Step {step}: {' '.join(draw.choices(words, k=38))} = {draw.randrange(999)}" for step in range(8)
            ]
            row = {"prompt": f"Problem {number}: {' '.join(draw.choices(words, k=30))}?", "completions": steps}
            file.write(json.dumps({**row, "labels": [draw.random() < 0.7 for _ in steps]}) + "\n")


def run_ours(path: str, model: str) -> int:
    """Number of tokens."""
    from pipa_openrlhf.config import DataConfig, RunConfig
    from pipa_openrlhf.data.dataset import load_samples
    from pipa_openrlhf.model.loading import load_tokenizer

    config = RunConfig(data=DataConfig(dataset=path, annotation="step", max_len=4096))
    loaded = load_samples(config, load_tokenizer(model), dataset=path)
    return sum(len(sample.input_ids) for sample in loaded.samples)


def run_map(path: str, model: str) -> int:
    """Number of tokens; the end-of-text token is added, as ours are."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(rows: dict) -> dict:
        texts = [p + "\n".join(steps) for p, steps in zip(rows["prompt"], rows["completions"], strict=True)]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [one + [tokenizer.eos_token_id] for one in ids]}

    datasets.disable_progress_bars()
    table = datasets.load_dataset("json", data_files=path, split="train")
    table = table.map(tokens, batched=True, remove_columns=table.column_names)
    return sum(len(ids) for batch in table.iter(1000) for ids in batch["input_ids"])


def measure(side: str, path: str, model: str) -> dict:
    """Seconds, processor seconds, MiB at the peak above the start and tokens, all of this process."""
    import torch  # noqa: F401  # both sides import it: its memory is no part of either
    import transformers  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    tokens = (run_ours if side == "ours" else run_map)(path, model)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "processor": processor,
        "mib": (after.ru_maxrss - before.ru_maxrss) / 1024,
        "tokens": tokens,
    }


def main() -> None:
    """Print both sides and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder whose tokenizer is used")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.path, options.model)))
        return
    print_head()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        found = {}
        for side in SIDES:
            words = ["--model", options.model, "--side", side, "--path", str(path)]
            quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, __file__, *words],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **quiet},
                check=True,
            )
            found[side] = json.loads(done.stdout.splitlines()[-1])
    print(f"{options.rows} rows of {found['ours']['tokens'] / options.rows:.0f} tokens")
    print(f"{'':14}{'seconds':>10}{'processor s':>13}{'MiB':>8}{'MiB / 1,000 rows':>18}")
    for side, one in found.items():
        per_row = one["mib"] / options.rows * 1000
        print(f"{side:14}{one['seconds']:10.1f}{one['processor']:13.1f}{one['mib']:8.0f}{per_row:18.2f}")
    ours, bare = found["ours"], found["datasets.map"]
    print(f"ratio of seconds {ours['seconds'] / bare['seconds']:.2f}, of processor time ", end="")
    print(f"{ours['processor'] / bare['processor']:.2f}; tokens {ours['tokens']} and {bare['tokens']}")


if __name__ == "__main__":
    main()
