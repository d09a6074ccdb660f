"""docs/extending.md: its files, taken from the page as they stand, train; and bad files are refused in one line."""

import math
import re
from pathlib import Path

import pytest
from reference import BETA, mean, scored
from tiny import flags, run_in_process, train, write_jsonl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
PAIRS = [
    ("1+1?\n", ["a=2", "so 2"], ["a=3", "so 3"], [1, 0]),
    ("Q ", ["so"], ["n", "no"], [1, 0]),
    ("What is your name?", ["I am Bo"], ["My name", "is not for you"], [1, 0]),
]
PAIRED = [
    {"prompt": prompt, "chosen": right, "rejected": wrong, "rejected_labels": labels}
    for prompt, right, wrong, labels in PAIRS
]


@pytest.fixture
def run_flags(tiny_models, tmp_path):
    def make(source: str | None, output="run", **changes) -> list[str]:
        module = tmp_path / "my_loss.py"
        if source is not None:
            module.write_text(source)
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "prior.model_name_or_path": tiny_models / "prior",
                "prior.cache_dir": tmp_path / "cache",
                "data.dataset": write_jsonl(tmp_path / "pairs.jsonl", PAIRED),
                "ds.param_dtype": "fp32",
                "pipa.objective_module": module,
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="module")
def answers(tiny_models):
    return [
        scored(tiny_models, prompt, steps, labels, "step")
        for prompt, right, wrong, wrong_labels in PAIRS
        for steps, labels in ((right, [1] * len(right)), (wrong, wrong_labels))
    ]


def test_the_page_has_both_examples():
    assert set(EXAMPLES) == {"focal.py", "hinge.py"}


def focal(r: float, label: int) -> float:
    likelihood = 1 / (1 + math.exp(-r if label else r))
    return -((1 - likelihood) ** 2) * math.log(likelihood)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_token_loss_example(answers, run_flags, fused):
    by_token = [[focal(r, c) for r, c in zip(one.r, one.labels)] for one in answers]
    runs = []
    for micro in (1, 6):
        changes = {"data.annotation": "step", "train.micro_batch_size": micro, "train.fused_head": fused}
        [row] = train("train_pipa", *run_flags(EXAMPLES["focal.py"], f"micro{micro}", **changes))
        assert row["loss"] == pytest.approx(mean(map(sum, by_token)), rel=1e-4)
        assert row["pipa/value_likelihood"] == pytest.approx(0.5)
        runs.append(row)
    assert runs[0]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-4)
    changes = {"data.annotation": "step", "pipa.loss_reduction": "token_mean"}
    [row] = train("train_pipa", *run_flags(None, "token_mean", **changes))
    assert row["loss"] == pytest.approx(mean(sum(by_token, [])), rel=1e-4)


def test_the_fused_head_forms_the_gradient_of_a_users_loss(run_flags):
    plain, fused = (
        train("train_pipa", *run_flags(EXAMPLES["focal.py"], switch, **{"train.fused_head": switch}))[0]
        for switch in ("false", "true")
    )
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_answer_loss_example(answers, run_flags, capsys):
    [row] = train("train_pipa", *run_flags(EXAMPLES["hinge.py"], **{"train.micro_batch_size": 2}))
    assert "--model.beta has no effect" not in capsys.readouterr().out
    margins = [chosen.R - rejected.R for chosen, rejected in zip(answers[0::2], answers[1::2])]
    assert row["loss"] == pytest.approx(mean(max(0.0, 1 - BETA * margin) for margin in margins), rel=1e-4)
    assert row["rewards/margins"] == pytest.approx(BETA * mean(margins), rel=1e-4)
    assert row["rewards/accuracies"] == mean(margin > 0 for margin in margins)
    assert "pipa/value_likelihood" not in row


def test_beta_reaches_the_users_objective(answers, run_flags, capsys):
    [row] = train("train_pipa", *run_flags(EXAMPLES["hinge.py"], **{"model.beta": 0.5}))
    assert "no effect" not in capsys.readouterr().out
    margins = [chosen.R - rejected.R for chosen, rejected in zip(answers[0::2], answers[1::2])]
    assert row["loss"] == pytest.approx(mean(max(0.0, 1 - 0.5 * margin) for margin in margins), rel=1e-4)


def test_a_file_may_hold_dataclasses_with_postponed_annotations(run_flags):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    tail = "\n\n@dataclass\nclass Mine:\n    x: int\n"
    [row] = train("train_pipa", *run_flags(head + EXAMPLES["hinge.py"].split('"""\n', 1)[1] + tail))
    assert row["loss"] > 0


NO_LOSS = "make_objective = lambda config: Objective('x', '', '', '', '')"
STEP_LEVEL = "make_objective = lambda config: Objective('Mine', '', '', '', '', abs, needs_step_labels=True)"
IMPORT = "from pipa_openrlhf.objectives.objective import Objective\n"


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "no such file"),
        ("def make_objective(config):\n    return (\n", "line 2: '(' was never closed"),
        ("loss = 1\n", "it must define make_objective(config)"),
        ("make_objective = 1\n", "it must define make_objective(config)"),
        ("def make_objective(config):\n    return 'dpo'\n", "must return an Objective, got 'dpo'"),
        (IMPORT + NO_LOSS, "set exactly one of token_loss and answer_loss"),
        (IMPORT + STEP_LEVEL, "Mine needs step labels: give --data.annotation step"),
    ],
)
def test_bad_files_are_refused_in_one_line(run_flags, capsys, source, message):
    assert run_in_process("train_pipa", *run_flags(source)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_file_that_is_not_python_by_its_name_is_refused(run_flags, tmp_path, capsys):
    (tmp_path / "loss.txt").write_text(EXAMPLES["hinge.py"])
    assert run_in_process("train_pipa", *run_flags(None, **{"pipa.objective_module": tmp_path / "loss.txt"})) == 1
    assert "loss.txt: not a Python file" in capsys.readouterr().err
