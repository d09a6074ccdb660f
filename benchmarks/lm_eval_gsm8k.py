"""Our ``evaluate`` beside lm-eval's on the same GSM8K problems, prompts and model, verdict by verdict.

    python3.11 -m venv FOLDER/lm && FOLDER/lm/bin/pip install torch transformers==5.15.0 accelerate lm-eval==0.4.13
    export LM_EVAL_PYTHON=FOLDER/lm/bin/python
    python benchmarks/lm_eval_gsm8k.py --model MODEL --gsm8k FOLDER [--problems 100] [--shots 2] [--output FOLDER]

The folder holds GSM8K's ``train.jsonl`` and ``test.jsonl``. Both are shown the same worked examples, the first of the
training questions; both answer greedily in float32. lm-eval's task is its own ``gsm8k`` (filters, metric, stop texts),
but for the local files, the first examples instead of random ones, and a line end before the answer. It prints whether
the prompts are the same, the two accuracies, and every problem on which the verdicts differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

MAX_NEW_TOKENS = 256
TASK = """\
include: gsm8k.yaml
task: gsm8k_local
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:\\n"
target_delimiter: ""
num_fewshot: {shots}
fewshot_config: {{sampler: first_n}}
"""


def main() -> None:
    arguments = parse_arguments()
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        sys.exit("error: LM_EVAL_PYTHON is not set: the head of this file says how to install lm-eval")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    write_problems(Path(arguments.gsm8k), output, arguments.problems, arguments.shots)
    ours = evaluate_ours(arguments.model, output, arguments.shots)
    theirs = evaluate_theirs(python, arguments.model, output, arguments.shots)
    compare(ours, theirs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--output", default="runs/lm_eval_gsm8k")
    return parser.parse_args()


def write_problems(gsm8k: Path, output: Path, problems: int, shots: int) -> None:
    for name, number in (("test", problems), ("train", shots)):
        lines = (gsm8k / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate_ours(model: str, output: Path, shots: int) -> list[dict]:
    """Rows of ``evaluate``, in the order of the problems."""
    folder = output / "ours"
    command = [sys.executable, "-m", "pipa_openrlhf.cli.evaluate", "--model.model_name_or_path", model]
    command += ["--problems.file", str(output / "test.jsonl"), "--prompt.few_shot", str(output / "train.jsonl")]
    command += ["--prompt.shots", str(shots), "--data.input_template", "Question: {}\nAnswer:\n"]
    command += ["--evaluate.max_new_tokens", str(MAX_NEW_TOKENS), "--ds.param_dtype", "fp32"]
    command += ["--evaluate.batch_size", "16", "--evaluate.output_dir", str(folder)]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["problem_id"]))


def evaluate_theirs(python: str, model: str, output: Path, shots: int) -> list[dict]:
    """lm-eval's logged samples under its strict filter, in the order of the problems."""
    source = (
        "import lm_eval, os; print(os.path.join(os.path.dirname(lm_eval.__file__), 'tasks', 'gsm8k', 'gsm8k.yaml'))"
    )
    task = subprocess.run([python, "-c", source], check=True, capture_output=True, text=True).stdout.split("\n")[-2]
    tasks = output / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "gsm8k.yaml").write_text(Path(task).read_text(encoding="utf-8"), encoding="utf-8")
    files = {name: json.dumps(str((output / f"{name}.jsonl").resolve())) for name in ("train", "test")}
    (tasks / "gsm8k_local.yaml").write_text(TASK.format(shots=shots, **files), encoding="utf-8")
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", str(tasks / "gsm8k_local.yaml"), "--device", "cpu", "--batch_size", "16"]
    command += [
        "--gen_kwargs",
        f"max_gen_toks={MAX_NEW_TOKENS}",
        "--log_samples",
        "--output_path",
        str(output / "theirs"),
    ]
    subprocess.run(command, check=True)
    newest = max((output / "theirs").rglob("samples_*.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["filter"] == "strict-match"), key=lambda row: row["doc_id"])


def compare(ours: list[dict], theirs: list[dict]) -> None:
    """Print both accuracies and every problem that only one of them calls right.

    Raises:
        SystemExit: they did not answer the same problems.
    """
    if [row["question"] for row in ours] != [row["doc"]["question"] for row in theirs]:
        sys.exit("error: not the same problems; remove the output folder and run again")
    right = [(bool(mine["right"]), bool(other["exact_match"])) for mine, other in zip(ours, theirs)]
    same_text = sum(mine["completion"].strip() == other["resps"][0][0].strip() for mine, other in zip(ours, theirs))
    number = len(right)
    print(f"ours {sum(mine for mine, _ in right)} of {number}, lm-eval {sum(other for _, other in right)} of {number}")
    print(f"the same verdict on {sum(mine == other for mine, other in right)}, the same text on {same_text}")
    for (mine, other), row, sample in zip(right, ours, theirs):
        if mine != other:
            told = {"problem": row["problem_id"], "gold": row["answer"], "ours": mine, "lm-eval": other}
            print(json.dumps(told | {"our text": row["completion"], "its text": sample["resps"][0][0]}, indent=1))


if __name__ == "__main__":
    main()
