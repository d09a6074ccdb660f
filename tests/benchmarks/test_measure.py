"""What the benchmarks measure with: FLOPs of known products, equal data for every arm, verdicts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import inputs  # noqa: E402
import measure  # noqa: E402
import train_step  # noqa: E402


def test_flops_of_products_and_attention_both_ways():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert measure.count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert measure.count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 5 * 7, "b needs no gradient"
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = measure.count_flops(lambda: attention(query, query, query, is_causal=True))
    assert forward == 2 * (2 * 2 * 4 * 16 * 16 * 8)
    both = measure.count_flops(lambda: attention(query, query, query, is_causal=True).sum().backward())
    assert both == forward * 3.5, "five products backward, the scores once more among them"


def test_every_arm_gets_the_same_sequences(tmp_path):
    tokenizer = inputs.byte_tokenizer()
    problems = inputs.whole_batches(inputs.natural_problems(64), 16)
    inputs.write_data(tmp_path, problems, tokenizer.eos_token)
    expected = inputs.expected_sequences(problems, tokenizer)
    assert len(expected) == 64
    prompt_tokens = sum(total - answer for total, answer in expected.values())
    assert 0.2 < prompt_tokens / sum(total for total, _ in expected.values()) < 0.3

    def keys(name: str, *columns: str) -> set[str]:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        texts = [(row["prompt"], row[column].removesuffix(tokenizer.eos_token)) for row in rows for column in columns]
        ids = [(tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]) for prompt, text in texts]
        return {inputs.sequence_key([*p, *a, tokenizer.eos_token_id], len(p)) for p, a in ids}

    assert keys("answers", "completion") == set(expected)
    assert keys("pairs", "chosen", "rejected") == keys("openrlhf", "chosen", "rejected") == set(expected)


def test_other_tokens_or_other_log_probs_stop_the_comparison():
    expected = {"a": (5, 3), "b": (6, 4)}
    good = {"log_probs": {"a": -1.0, "b": -2.0}}
    assert train_step.check_sequences(expected, {"pipa": good, "trl_dpo": good}, 1e-4) == 0
    with pytest.raises(SystemExit, match="trl_dpo: 1 of 2 sequences have other tokens"):
        train_step.check_sequences(expected, {"pipa": good, "trl_dpo": {"log_probs": {"a": -1.0}}}, 1e-4)
    with pytest.raises(SystemExit, match="trl_dpo: log-probs differ"):
        train_step.check_sequences(expected, {"pipa": good, "trl_dpo": {"log_probs": {"a": -1.0, "b": -2.1}}}, 1e-4)


def test_a_ratio_with_a_target_ends_in_its_verdict(capsys):
    measure.print_ratio("a", 1.5, least=1.5)
    measure.print_ratio("b", 1.499, (1.4, 1.6), least=1.5)
    measure.print_ratio("c", 1.2, most=1.1)
    measure.print_ratio("d", 1.2)
    measure.print_ratio("e: did not run", math.nan, least=1.5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["ok", "MISSED", "MISSED", "1.200", "MISSED"]


def test_a_result_names_its_commit_date_and_machine(tmp_path, capsys):
    measure.print_head()
    command, provenance = capsys.readouterr().out.splitlines()
    assert command.startswith("python benchmarks/")
    measure.write_json(tmp_path / "result.json", {"answer": 42})
    result = json.loads((tmp_path / "result.json").read_text())
    assert provenance.startswith(f"commit {result['commit']}, {result['date']}; ")
    assert result["machine"]["cpu"] and result["answer"] == 42


@pytest.mark.slow
def test_no_step_takes_many_more_flops_than_it_must(tmp_path):
    """Not measured on an idle machine; the program is stopped after 1200 seconds."""
    command = [sys.executable, str(ROOT / "benchmarks" / "limit.py"), "--output", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    verdicts = [line.split()[-1] for line in done.stdout.splitlines() if " target " in line]
    assert verdicts == ["ok", "ok", "ok"]


@pytest.mark.slow
def test_the_real_trainers_train_on_the_same_and_every_target_has_a_verdict(tmp_path):
    """Not measured on an idle machine; the program is stopped after 1200 seconds."""
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--quick", "--repeats", "1"]
    done = subprocess.run([*command, "--output", str(result)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    with_target = [line for line in done.stdout.splitlines() if " target " in line]
    assert len(with_target) == 17 and all(line.split()[-1] in ("ok", "MISSED") for line in with_target)
    assert "did not run" not in done.stdout
    verdicts = [word for line in done.stdout.splitlines() for word in line.split() if word in ("ok", "MISSED")]
    assert len(verdicts) == len(with_target), "these words occur nowhere else"
    equal, natural = json.loads(result.read_text())["sections"]
    ours = equal["counted"]["pipa"]["round"]["flops"]
    assert equal["counted"]["trl_dpo"]["round"]["flops"] > 1.4 * ours, "a third forward pass"
    assert natural["counted"]["pipa"]["round"]["flops"] < natural["counted"]["trl_dpo_precomputed"]["round"]["flops"]
