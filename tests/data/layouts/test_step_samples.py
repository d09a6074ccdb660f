"""Layouts of step-labelled answers, on samples of public files."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts import LAYOUTS
from pipa_openrlhf.errors import UserError

SAMPLES = Path(__file__).parents[3].parent / "shared" / "data" / "layouts"


READ_RIGHT = [
    ("prm800k_openr_sample.jsonl", "prm800k", {"neutral_step": "positive"}),
    ("math_shepherd_openr_sample.jsonl", "math_shepherd", {}),
    ("trl_math_shepherd_converted.jsonl", "math_shepherd", {}),
    ("ProcessBench/gsm8k.json", "processbench", {}),
    ("rlhflow_prm.jsonl", "rlhflow_prm", {}),
    ("openrlhf_math_shepherd_value.jsonl", "rlhflow_prm", {}),
    ("openrlhf_prm_soft.jsonl", "rlhflow_prm", {}),
    ("step_dpo.jsonl", "step_dpo", {}),
    ("step_dpo_pipeline_output.json", "step_dpo", {}),
]


@pytest.mark.parametrize("file, right, flags", READ_RIGHT)
def test_samples_are_read_right(read_records, sample_rows, file, right, flags):
    _, records = read_records(sample_rows(file), **flags)
    keys = ("prompt", "steps", "step_labels", "answer_label", "complete", "problem_id")
    expected = [{key: row[key] for key in keys} for row in sample_rows(f"right_reading/{right}.jsonl")]
    assert [{key: getattr(one, key) for key in keys} for one in records] == expected


def test_trls_conversion_of_prm800k_is_read_like_the_original(read_records, sample_rows):
    """It takes neutral steps for wrong ones."""
    name, converted = read_records(sample_rows("trl_prm800k_converted.jsonl"))
    assert name == "stepwise"
    _, original = read_records(sample_rows("prm800k_openr_sample.jsonl"), neutral_step="negative")
    for one, other in zip(converted, original, strict=True):
        assert replace(one, where=other.where) == other


@pytest.mark.parametrize(
    "file, layout, count",
    [
        ("prm800k_stepwise_jubba.jsonl", "rated_steps", 2),
        ("openr_prm_process.json", "tagged", 3),
        ("rlhflow_orm.jsonl", "sign_turns", 2),
        ("math_aps_openr_sample.jsonl", "mc_tree", None),
        ("math_aps_tree_openr_sample.jsonl", "mc_tree", None),
        ("alphamath_list.json", "alphamath", None),
        ("alphamath_json_string.json", "alphamath", None),
        ("alphamath_q_string.json", "alphamath", None),
        ("alphamath_trailing_newline.json", "alphamath", None),
        ("axolotl_stepwise.jsonl", "stepwise", None),
        ("trl_stepwise.jsonl", "stepwise", None),
        ("trl_stepwise_float.jsonl", "stepwise", None),
    ],
)
def test_samples_are_recognised(read_records, sample_rows, file, layout, count):
    name, records = read_records(sample_rows(file))
    assert name == layout
    assert count is None or len(records) == count


@pytest.mark.parametrize(
    "file, message",
    [
        ("step_dpo_one_empty_rejected.jsonl", "line 3: 'rejected' is empty"),
        ("alphamath_empty_step.json", "line 2: 'output\\[1\\].step' is empty"),
    ],
)
def test_samples_are_refused(read_records, sample_rows, file, message):
    with pytest.raises(UserError, match=message):
        read_records(sample_rows(file))


def test_no_row_of_these_fits_another_layout():
    for name in ("prm800k", "rated_steps", "tagged", "first_error", "sign_turns", "mc_tree", "rollouts", "step_dpo"):
        row = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").EXAMPLE
        assert _fitting(row) == [name]


def test_no_sample_fits_two_layouts(sample_rows):
    sample_rows("step_dpo.jsonl")  # skips where there are none
    for path in [*SAMPLES.glob("*.json*"), *SAMPLES.glob("ProcessBench/*.json")]:
        for row in sample_rows(str(path.relative_to(SAMPLES))):
            assert len(_fitting(row)) <= 1, path.name


def _fitting(row: dict) -> list[str]:
    flags = DataConfig()
    return [name for name in LAYOUTS if importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").fits(row, flags)]
