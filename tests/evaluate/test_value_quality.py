"""Quality of step values against numbers worked out by hand, and the command on a tiny model."""

import json

import numpy as np
import pytest
import torch
from samples import random_samples
from tiny import flags, make_model, make_tokenizer, read_jsonl, run_in_process, write_jsonl

from pipa_openrlhf.data.samples import Sample
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.value_quality import (
    Judged,
    auc,
    best_threshold,
    calibration,
    calibration_error,
    detection,
    first_below,
    halves,
    judge,
    summarise,
)
from pipa_openrlhf.model.policy import ValueHead, save_value_head
from pipa_openrlhf.model.value_model import load_value_model

EOS = 257


def answer(problem_id: str, labels: list[int], values: list[float]) -> Judged:
    of_readings = {"after": np.array(values), "last": np.array(values) / 2}
    return Judged("here", problem_id, np.arange(len(labels)), np.array(labels), of_readings)


# Found at 0.5: of the erroneous ones the first and the last, of the correct ones the first.
ANSWERS = [
    answer("a", [1, 0, 0], [0.9, 0.2, 0.8]),
    answer("b", [1, 0, 0], [0.4, 0.1, 0.1]),
    answer("c", [1, 1, 0], [0.9, 0.9, 0.9]),
    answer("d", [0], [0.3]),
    answer("e", [1, 1], [0.7, 0.6]),
    answer("f", [1, 1], [0.7, 0.2]),
    answer("g", [1], [0.1]),
]


def test_first_error_detection():
    found = detection(ANSWERS, "after", 0.5)
    assert (found["n_erroneous"], found["n_correct"]) == (4, 3)
    assert found["erroneous"] == 0.5 and found["correct"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    low, high = found["erroneous_interval_95"]
    assert 0 <= low < 0.5 < high <= 1
    assert found["threshold"] == 0.5


def test_a_step_at_the_threshold_is_not_below_it():
    assert first_below(np.array([0.5, 0.4]), 0.5) == 1
    assert first_below(np.array([0.5]), 0.5) is None


def test_detection_where_there_is_nothing_to_find():
    right = detection([answer("a", [1, 1], [0.9, 0.8])], "after", 0.5)
    assert right["correct"] == 1 and right["erroneous"] is None and right["f1"] is None
    nothing = detection([ANSWERS[1], ANSWERS[6]], "after", 0.5)
    assert nothing["f1"] == 0


def test_the_best_threshold_finds_most():
    """Above 0.3 the wrong step of d is found, above 0.4 the first of b is called wrong."""
    threshold = best_threshold(ANSWERS, "after")
    assert 0.3 < threshold <= 0.4
    found = detection(ANSWERS, "after", threshold)
    scores = [detection(ANSWERS, "after", one / 50)["f1"] for one in range(51)]
    assert found["f1"] == max(scores)
    assert best_threshold(ANSWERS, "last") == pytest.approx(threshold / 2, abs=0.01)


def test_halves_keep_a_problem_together():
    many = [answer(str(number), [1], [0.5]) for number in range(40)] * 2
    first, second = ({one.problem_id for one in half} for half in halves(many))
    assert not first & second and min(len(first), len(second)) > 8 and len(first | second) == 40


@pytest.mark.parametrize(
    "values, labels, expected",
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([0.5, 0.5, 0.9], [0, 1, 1], 0.75),  # a tie is half
        ([0.9, 0.1], [0, 1], 0),
        ([0.9, 0.1], [1, 1], None),
    ],
)
def test_auc(values, labels, expected):
    assert auc(np.array(values), np.array(labels)) == expected


def test_auc_is_the_share_of_pairs_in_order():
    draws = np.random.default_rng(0)
    values, labels = draws.integers(0, 20, 200) / 20, draws.integers(0, 2, 200)
    pairs = [
        1.0 if right > wrong else 0.5 if right == wrong else 0.0
        for right in values[labels == 1]
        for wrong in values[labels == 0]
    ]
    assert auc(values, labels) == pytest.approx(np.mean(pairs))


def test_calibration():
    bins = calibration(np.array([0.05, 0.0, 1.0, 0.95, 0.95]), np.array([0, 1, 1, 1, 0]))
    assert [(one["from"], one["n"], one["share_right"]) for one in bins] == [
        (0, 2, 0.5),
        (0.9, 3, pytest.approx(2 / 3)),
    ]
    assert bins[0]["mean_value"] == pytest.approx(0.025)
    assert calibration_error(bins) == pytest.approx((2 * (0.5 - 0.025) + 3 * (2.9 / 3 - 2 / 3)) / 5)


def make_head() -> ValueHead:
    torch.manual_seed(0)
    head = ValueHead(16, 8, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    return head


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    make_model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    save_value_head(str(path), make_head().state_dict())
    return str(path)


def test_where_the_value_of_a_step_is_read(folder):
    """Steps of 2, 2, 1 and 2 tokens; the second has no label, the fourth ends with the answer."""
    [plain] = random_samples([(3, 7)], 256)
    ids = plain.input_ids.copy()
    ids[-1] = EOS
    sample = Sample(
        input_ids=ids,
        prompt_len=3,
        labels=np.array([1, 1, 0, 0, 1, 0, 0], dtype=np.int8),
        mask=np.array([1, 1, 0, 0, 1, 1, 1], dtype=np.int8),
        step_ids=np.array([0, 0, 1, 1, 2, 3, 3], dtype=np.int32),
        answer_label=0,
        problem_id="p",
        pair_id=None,
        where="here",
    )
    value_model = load_value_model(folder, torch.float32)
    [values] = value_model.token_values([ids.tolist()])
    [judged] = judge(value_model, [sample], EOS)
    assert judged.steps.tolist() == [0, 2, 3] and judged.labels.tolist() == [1, 1, 0]
    assert judged.values["after"].tolist() == values[[4, 7, 8]].tolist()
    assert judged.values["last"].tolist() == values[[3, 6, 8]].tolist()

    # Without an end the last token is one as any other; and what the model did not write is read, but not judged.
    ids[-1] = 7
    sample.mask[-1] = 0
    [values] = value_model.token_values([ids.tolist()])
    [judged] = judge(value_model, [sample], EOS)
    assert judged.values["after"].tolist() == values[[4, 7, 9]].tolist()
    assert judged.values["last"].tolist() == values[[3, 6, 7]].tolist()


ROWS = [  # ProcessBench's columns
    {"problem": f"{n}+1+1=", "steps": [f"{n}+1={n + 1}", "so", "done"], "final_answer_correct": n % 2 == 0}
    | {"label": -1 if n % 2 == 0 else n % 3}
    for n in range(12)
]


@pytest.mark.parametrize("more", [{}, {"quality.choose_threshold": True}])
def test_the_command(folder, tmp_path, capsys, more):
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    words = {"model.model_name_or_path": folder, "data.dataset": data, "ds.param_dtype": "fp32"}
    words |= {"quality.output_dir": tmp_path / "out", "data.cache_dir": tmp_path / "cache", **more}
    assert run_in_process("evaluate_value", *flags(words)) == 0
    printed = capsys.readouterr().out
    rows = read_jsonl(tmp_path / "out" / "steps.jsonl")
    assert len(rows) == 12 and rows[1]["labels"] == [1, 0, 0] and rows[0]["labels"] == [1, 1, 1]
    tokenizer, value_model = make_tokenizer(), load_value_model(folder, torch.float32)
    text = ROWS[1]["problem"] + ROWS[1]["steps"][0] + "\n"
    assert rows[1]["values"]["after"][0] == pytest.approx(value_model.values([tokenizer(text).input_ids])[0], abs=1e-5)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    judged = [
        Judged(
            row["where"],
            row["problem_id"],
            np.array(row["steps"]),
            np.array(row["labels"]),
            {name: np.array(values) for name, values in row["values"].items()},
        )
        for row in rows
    ]
    again = summarise(judged, 0.5, bool(more))
    for name, reading in summary["readings"].items():
        assert reading["auc"] == pytest.approx(again["readings"][name]["auc"], abs=0.03)
        assert reading["detection"]["n_correct"] == again["readings"][name]["detection"]["n_correct"]
    assert summary["answers"] == (12 if not more else again["answers"]) and again["answers"] >= 3
    assert "of its last token" in printed and "AUC" in printed and "erroneous" in printed
    assert (tmp_path / "out" / "calibration.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quality.output_dir": None}, "--quality.output_dir is required"),
        ({"model.model_name_or_path": "/nowhere/at/all"}, "--model.model_name_or_path"),
        ({"value_head": None}, "no value head in"),
        ({"rows": [{"prompt": "1+1=", "completion": "2", "label": True}]}, "--data.annotation step"),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, capsys, change, words):
    data = write_jsonl(tmp_path / "data.jsonl", change.pop("rows", ROWS))
    if "value_head" in change:
        (tmp_path / "model" / "value_head.safetensors").unlink()
        del change["value_head"]
    given = {"model.model_name_or_path": folder, "data.dataset": data, "quality.output_dir": tmp_path / "out"}
    given |= {"data.cache_dir": tmp_path / "cache", "ds.param_dtype": "fp32"}
    assert run_in_process("evaluate_value", *flags(given | change)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_a_half_with_too_few_problems_is_refused():
    """Three answers to one problem are all in one half."""
    one = Judged("x", "x", np.arange(1), np.ones(1), {name: np.ones(1) for name in ("after", "last")})
    with pytest.raises(UserError, match="several problems in each half"):
        summarise([one] * 3, 0.5, choose_threshold=True)
