"""What the benchmarks measure with: FLOPs of known products, equal data for every arm, verdicts."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import arms  # noqa: E402
import inputs  # noqa: E402
import measure  # noqa: E402
import peers_apart  # noqa: E402
import turns  # noqa: E402
from targets import Ratio  # noqa: E402


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
    tokenizer = inputs.character_tokenizer()
    same = inputs.Problem([9], [[1, 2], [3], [1, 2], [4]])
    problems = [*inputs.equal_problems(6), same]
    inputs.write_data(tmp_path, problems)
    expected = inputs.expected_sequences(problems)
    assert sum(one.times for one in expected.values()) == 10 and len(expected) == 9
    assert expected[inputs.sequence_key([9, 1, 2, inputs.END], 1)] == inputs.Expected(4, 3, times=2)
    assert [(one.tokens, one.loss_tokens) for one in expected.values()][:6] == [(256, 192)] * 6

    def keys(name: str, *columns: str) -> list[str]:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        texts = [(row["prompt"], row[column].removesuffix(inputs.EOS)) for row in rows for column in columns]
        ids = [(tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]) for prompt, text in texts]
        return sorted(inputs.sequence_key([*p, *a, inputs.END], len(p)) for p, a in ids)

    every = sorted(key for key, one in expected.items() for _ in range(one.times))
    assert keys("answers", "completion") == every
    assert keys("pairs", "chosen", "rejected") == keys("openrlhf", "chosen", "rejected") == every


def test_an_arm_whose_reader_drops_sequences_is_named_and_ended():
    ended = []
    workers = {
        arm: SimpleNamespace(close=lambda arm=arm: ended.append(arm)) for arm in ("pipa", "trl_dpo", "swift_dpo")
    }
    replies = {"pipa": ["a"], "trl_dpo": ["a", "b"], "swift_dpo": ["b"]}
    sequences = {arm: {"log_probs": dict.fromkeys(keys, 0.0)} for arm, keys in replies.items()}
    expected, failures = dict.fromkeys("ab"), {}
    arms.leave_out_readers_of_less(expected, workers, sequences, failures)
    assert failures == {"swift_dpo": "its reader leaves out 1 of the 2 different sequences"}
    assert ended == ["swift_dpo"] and list(workers) == list(sequences) == ["pipa", "trl_dpo"], "ours must have all"


def test_other_tokens_or_other_log_probs_stop_the_comparison():
    expected = {"a": inputs.Expected(5, 3, 2), "b": inputs.Expected(6, 4, 1)}
    good = {"log_probs": {"a": -1.0, "b": -2.0}}
    ours = {**good, "trained": [-2.0, -1.0, -1.0]}
    assert arms.check_sequences(expected, {"pipa": ours, "trl_dpo": good}, 1e-4) == 0
    with pytest.raises(SystemExit, match="trl_dpo: 1 of 2 sequences have other tokens"):
        arms.check_sequences(expected, {"pipa": good, "trl_dpo": {"log_probs": {"a": -1.0}}}, 1e-4)
    with pytest.raises(SystemExit, match="trl_dpo: log-probs differ"):
        arms.check_sequences(expected, {"pipa": good, "trl_dpo": {"log_probs": {"a": -1.0, "b": -2.1}}}, 1e-4)
    with pytest.raises(SystemExit, match="pipa: log-probs differ"):
        arms.check_sequences(expected, {"pipa": {**good, "trained": [-2.0, -2.0, -1.0]}}, 1e-4)


def test_a_first_pass_has_our_prior_pass_in_it():
    def arm(flops: float, seconds: list[float], prior: tuple[float, list[float]] | None = None) -> tuple[dict, dict]:
        parts = {"round": (flops, seconds), **({"prior": prior} if prior else {})}
        timed = {name: [{"seconds": one} for one in each] for name, (_, each) in parts.items()}
        return {name: {"flops": one} for name, (one, _) in parts.items()}, {"prior": [], **timed}

    ours = arm(10.0, [1.0, 2.0, 3.0], prior=(10.0, [1.0, 2.0, 1.0]))
    measured = {"pipa": ours, "trl_kto": arm(40.0, [8.0, 8.0, 9.0])}
    result = {"counted": {name: one[0] for name, one in measured.items()}}
    result["timed"] = {name: one[1] for name, one in measured.items()}
    ratios = arms.ratios_of({"words": result})
    assert ratios["words", "trl_kto", False] == Ratio(4.0, 4.0, 3.0, 8.0)
    assert ratios["words", "trl_kto", True] == Ratio(2.0, 2.0, 2.0, 4.0)


def test_an_arm_that_needs_another_python_says_which_variable_names_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SWIFT_PYTHON", raising=False)
    spec = turns.Spec("swift_kto", "model", str(tmp_path), "fp32", False, 4, 2, 1, 64, 1)
    with pytest.raises(turns.WorkerFailed, match="set SWIFT_PYTHON"):
        turns.Worker(spec, tmp_path / "log")


def test_attention_sequence_by_sequence_is_that_of_each_sequence_alone():
    heads_tokens = [torch.randn(2, 7, 4, dtype=torch.float64) for _ in range(3)]
    result = peers_apart.attend(*heads_tokens, [0, 3, 7], [0, 3, 7], None)
    for start, end in ((0, 3), (3, 7)):
        query, key, value = (one[:, start:end] for one in heads_tokens)
        scores = query @ key.transpose(1, 2) / 2
        size = end - start
        scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)
        assert torch.allclose(result[:, start:end], scores.softmax(-1) @ value)
    query, key, value = heads_tokens
    shared = peers_apart.attend(query[:, 5:], key, value, [0, 2], [0, 7], None)
    whole = peers_apart.attend(query, key, value, [0, 7], [0, 7], None)
    assert torch.allclose(shared, whole[:, 5:]), "queries that lack their prefix are the last of their keys"


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
    """10 seconds."""
    command = [sys.executable, str(ROOT / "benchmarks" / "least.py"), "--output", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    verdicts = [line.split()[-1] for line in done.stdout.splitlines() if " target " in line]
    assert verdicts == ["ok", "ok"]


def test_an_arm_that_ends_while_it_is_timed_leaves_the_others_their_figures():
    class Stub:
        def __init__(self, rounds: int):
            self.rounds = rounds

        def ask(self, command: str) -> dict:
            self.rounds -= 1
            if self.rounds < 0:
                raise turns.WorkerFailed("gone")
            return {"seconds": 1.0}

        def close(self) -> None:
            self.rounds = -100

    workers, failures = {"pipa": Stub(4), "trl_kto": Stub(1)}, {}
    timed = arms.measure_in_turns(workers, failures, 2)
    assert failures == {"trl_kto": "gone"} and list(workers) == ["pipa"]
    assert list(timed) == ["pipa"] and len(timed["pipa"]["round"]) == len(timed["pipa"]["prior"]) == 2
