"""Preparing data against a bare ``datasets.map`` with the same tokenizer, from the same JSON Lines file.

    python benchmarks/data.py [--records 1000000] [--processes 2] [--repeats 1] [--output FILE]

Answers in labelled steps, some 370 tokens a record. The bare arm loads the file and tokenises prompt and answer as
one text; ours reads, labels, tokenises and stores them. Each arm is a process of its own, with caches that are empty.
Then come a second start up to the first micro-batch, and shuffling and planning, at the same number of records.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from inputs import ROOT
from measure import print_head, print_ratio, print_table, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

MIB = 2**20
KINDS = (".md", ".py")
TOKENS = (150, 430)  # of an answer; a prompt has three lines more


def make_tokenizer(folder: Path, lines: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the lines that the data are made of."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet))
    backend.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_data(folder: Path, count: int) -> None:
    """``data.jsonl`` of ``count`` records of random lines of this repository, and ``tokenizer``."""
    folders = ("benchmarks", "docs", "pipa_openrlhf", "recipes", "tests")
    texts = (path.read_text() for name in folders for path in sorted((ROOT / name).rglob("*")) if path.suffix in KINDS)
    lines = sorted({line.strip() for text in texts for line in text.splitlines() if 30 < len(line) < 120})
    tokenizer = make_tokenizer(folder / "tokenizer", lines)
    sizes = list(map(len, tokenizer(lines)["input_ids"]))
    rng = random.Random(0)
    with open(folder / "data.jsonl", "w") as file:
        for number in range(count):
            steps, left = [], rng.randint(*TOKENS)
            while left > 0:
                chosen = rng.randrange(len(lines))
                steps.append(lines[chosen])
                left -= sizes[chosen] + 1
            prompt = f"{number // 8} " + " ".join(rng.choices(lines, k=3)) + "\n"
            labels = [rng.random() < 0.7 for _ in steps]
            file.write(json.dumps({"prompt": prompt, "completions": steps, "labels": labels}) + "\n")


def bare(folder: Path, processes: int) -> dict:
    """What `datasets` does where nothing is asked of it but token ids."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenise(rows: dict) -> dict:
        texts = [prompt + "\n".join(steps) for prompt, steps in zip(rows["prompt"], rows["completions"])]
        return {"input_ids": tokenizer(texts, return_attention_mask=False)["input_ids"]}

    table = datasets.load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
    several = processes if processes > 1 else None
    table = table.map(tokenise, batched=True, num_proc=several, remove_columns=table.column_names)
    return {"tokens": sum(map(len, table[:1000]["input_ids"])) / len(table[:1000]["input_ids"])}


def ours(folder: Path, processes: int):
    """The samples."""
    from pipa_openrlhf.config import DataConfig, RunConfig
    from pipa_openrlhf.data.dataset import load_samples

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    flags = {"cache_dir": str(folder / "prepared"), "annotation": "step", "max_len": 2048, "num_proc": processes}
    path = str(folder / "data.jsonl")
    return load_samples(RunConfig(data=DataConfig(dataset=path, **flags)), tokenizer, dataset=path).samples


def start(folder: Path, processes: int) -> dict:
    """A second start: seconds to the first micro-batch, imports and all, and those of order and plan."""
    from pipa_openrlhf.data.plan import global_batches
    from pipa_openrlhf.data.training_set import Collator, MicroBatches, TrainingSet

    train_set = TrainingSet(ours(folder, processes))
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    peak = Peak(psutil.Process())
    train_set.fingerprint()
    micro_batches = MicroBatches(train_set, Collator(None, 0, "shared", False), 0, 8, 8, by_size=True)
    batches = global_batches(train_set.num_units, 128, 42, 0, micro_batches.prompts)
    plan = {"plan_seconds": time.perf_counter() - started, "plan_bytes": peak.stop() - before}
    next(micro_batches.answers(batches[0]))
    return {**plan, "seconds": time.time() - float(os.environ["BEGAN"])}


class Peak:
    """Largest resident memory of any process of a family, looked at all the time."""

    def __init__(self, root: psutil.Process):
        self._root, self._bytes, self._done = root, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.is_set():
            try:
                family = [self._root, *self._root.children(recursive=True)]
                self._bytes = max(self._bytes, *(one.memory_info().rss for one in family))
            except psutil.NoSuchProcess:
                pass
            self._done.wait(0.02)

    def stop(self) -> int:
        """Bytes."""
        self._done.set()
        self._thread.join()
        return self._bytes


def run_arm(name: str, folder: Path, processes: int) -> dict:
    """One arm in a process of its own: what it replies, seconds, processor seconds with its children, peak bytes."""
    caches = {"HF_DATASETS_CACHE": str(folder / f"datasets-{time.time_ns()}"), "HF_HUB_OFFLINE": "1"}
    environment = {
        **{**os.environ, **caches, "BEGAN": str(time.time()), "TOKENIZERS_PARALLELISM": "false"},
        **{"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
    }
    words = [sys.executable, __file__, "--arm", name, "--folder", str(folder), "--processes", str(processes)]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    peak = Peak(psutil.Process(process.pid))
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{name} ended with status {status}")
    measured = {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "mib": peak.stop() / MIB}
    return {**measured, **json.loads(output.splitlines()[-1])}


def compare(folder: Path, records: int, processes: int, repeats: int) -> dict:
    """All arms, the two that are compared in turns."""
    make_data(folder, records)
    runs: dict[str, list[dict]] = {"bare": [], "ours": []}
    for _ in range(repeats):
        for name in runs:
            subprocess.run(["rm", "-rf", str(folder / "prepared")], check=True)
            runs[name].append(run_arm(name, folder, processes))
    return {**runs, "start": [run_arm("start", folder, processes)]}


def report(runs: dict) -> None:
    """The table and the verdicts."""
    each = [(name, one) for name, some in runs.items() for one in some]
    rows = [[name, *(f"{one[key]:.0f}" for key in ("seconds", "cpu", "mib"))] for name, one in each]
    print_table(["arm", "seconds", "processor seconds", "largest process, MiB"], rows)
    best = {name: {key: min(one[key] for one in some) for key in some[0]} for name, some in runs.items()}
    again = runs["start"][0]
    print_ratio("processor time to that of a bare map", best["ours"]["cpu"] / best["bare"]["cpu"], most=1.2)
    print_ratio("wall time to that of a bare map", best["ours"]["seconds"] / best["bare"]["seconds"], most=1.2)
    print_ratio("largest process, GiB", max(one["mib"] for one in runs["ours"]) / 1024, most=1.5)
    print_ratio("second start to the first batch, seconds", again["seconds"], most=10)
    print_ratio("order and plan, seconds", again["plan_seconds"], most=5)
    print_ratio("order and plan, MiB", again["plan_bytes"] / MIB, most=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        reply = {"bare": bare, "ours": ours, "start": start}[given.arm](given.folder, given.processes)
        print(json.dumps(reply if isinstance(reply, dict) else {}))
        return
    print_head()
    with tempfile.TemporaryDirectory() as folder:
        runs = compare(Path(folder), given.records, given.processes, given.repeats)
    report(runs)
    if given.output:
        write_json(given.output, runs)


if __name__ == "__main__":
    main()
