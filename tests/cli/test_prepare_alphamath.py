"""AlphaMath's raw file to the answers of the paper: counts by hand, the same counts as training sees, regrading."""

import json

import pytest
from tiny import read_jsonl, run_in_process, write_jsonl

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.cli.inspect_data import summary
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.model.loading import load_tokenizer

APPLES, BUS, ROOT = (
    "Tom has 3 apples\nand eats 1. How many are left?",
    "How many halves are 2 wholes?",
    "Solve 2x = 1.",
)
GOLD = {APPLES: "2", BUS: "4", ROOT: r"\frac{1}{2}"}


def row(question, result, *values, code_output=None):
    """A path with one step a value; the last of them says ``result``."""
    steps = [{"step": f"<step>\n<p>\nthink {n}\n</p>\n</step>", "Q": q} for n, q in enumerate(values[:-1])]
    output = f"\n<output>\n{code_output}\n</output>" if code_output else ""
    last = {"step": f"<step>\n<p>\nFinal Answer: ${result}$\n</p>{output}\n</step>", "P": 1.0, "Q": values[-1]}
    # The published file has its steps as a JSON string.
    return {"instruction": f"<question> {question} </question>", "input": "", "output": json.dumps([*steps, last])}


# A dozen: right and wrong by their label 3 and 3, 1 and 3, 0 and 1; one that cannot be read.
ROWS = [
    row(APPLES, "2", 0.9, 1),
    row(APPLES, "2", 0.9, 0.8, 1),
    row(APPLES, "3", 0.5, -0.2, -1),  # its first step is right at 0.5
    row(APPLES, "two", -0.6, -1),
    row(APPLES, "2.0", 0.7, 0.2, -1),  # wrong format: 2.0 is 2
    row(APPLES, "5", 1),  # labelled right, with another result
    row(BUS, "4", -0.1, 1),
    row(BUS, "2", 0.3, -1, code_output="\\boxed{4}"),  # the interpreter's box is not its answer
    {"instruction": f"<question> {BUS} </question>", "output": json.dumps([{"step": "", "Q": -1}])},
    row(BUS, "8", 0.75, -1),
    row(BUS, "", -0.5, -1),
    row(ROOT, "0.5", 0.6, -1),  # wrong format, seen by algebra
]


@pytest.fixture
def prepare(tmp_path):
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(ROWS, indent=1))
    # As GSM8K has it, with other spaces than the raw file; and as MATH has it.
    gsm8k = [{"question": f" {q.replace(' ', '  ')} ", "answer": f"so\n#### {GOLD[q]}"} for q in (APPLES, BUS)]
    math = [{"problem": ROOT, "solution": f"It is $\\boxed{{{GOLD[ROOT]}}}$.", "level": "Level 1"}]
    golds = (write_jsonl(tmp_path / "gsm8k.jsonl", gsm8k), write_jsonl(tmp_path / "math.jsonl", math))

    def run(folder, *flags, regrade=True):
        words = [*flags, *(("--regrade", *golds) if regrade else ())]
        return run_in_process("prepare_alphamath", "--input", str(raw), "--output_dir", str(tmp_path / folder), *words)

    return run


SKIP = ("--on_error", "skip", "--max_error_share", "0.1")


def test_counts_without_regrading(prepare, tmp_path, capsys):
    assert prepare("out", *SKIP, regrade=False) == 0
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert {name: counts[name] for name in ("rows", "right", "wrong", "problems", "pairs", "graded")} == {
        "rows": 12,
        "right": 4,
        "wrong": 7,
        "problems": 3,
        "pairs": 3 + 1,
        "graded": 0,
    }
    assert (counts["steps_of_right"], counts["steps_of_wrong"]) == (2 + 3 + 1 + 2, 3 + 2 + 3 + 2 + 2 + 2 + 2)
    # Q of wrong answers, by hand: 0.5 -0.2 | -0.6 | 0.7 0.2 | 0.3 | 0.75 | -0.5 | 0.6, and -1 at every end.
    assert counts["right_steps_of_wrong"] == {"-0.5": 8, "0.0": 6, "0.25": 5, "0.5": 4, "0.75": 1, "1.0": 0}
    output = capsys.readouterr().out
    assert "12 rows read, 1 left out that cannot be read, 11 answers to 3 problems kept" in output
    assert "paired            4        4  any module, --data.pairing match" in output
    [skipped] = read_jsonl(tmp_path / "out" / "skipped_rows.jsonl")
    assert "'output[0].step' is empty" in skipped["reason"]


def test_wrong_formats_are_left_out_and_nothing_else_changes(prepare, tmp_path, capsys):
    assert prepare("out", *SKIP) == 0
    kept = [one for index, one in enumerate(ROWS) if index not in (4, 8, 11)]
    assert read_jsonl(tmp_path / "out" / "answers.jsonl") == kept
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    names = ("right", "wrong", "problems", "pairs", "graded", "wrong_format", "not_confirmed")
    assert [counts[name] for name in names] == [4, 5, 2, 2 + 1, 11, 2, 1]
    assert "2 labelled wrong with a right result left out; 1 labelled right with another" in capsys.readouterr().out


@pytest.mark.parametrize("pairing, right, answers", [("auto", 4, 9), ("match", 3, 6)])
def test_training_sees_the_same_counts(prepare, tmp_path, tiny_models, pairing, right, answers):
    prepare("out", *SKIP)
    words = ["--data.dataset", str(tmp_path / "out" / "answers.jsonl"), "--data.pairing", pairing]
    config = parse("inspect_data", [*words, "--data.annotation", "step"])
    loaded = load_samples(config, load_tokenizer(str(tiny_models / "policy")), dataset=config.data.dataset)
    lines = summary(loaded)
    assert lines[0] == f"answers   9 read, {answers} used, of 2 problems"
    assert lines[1].startswith(f"labels    answers: {right} right ")


def test_mistakes_end_in_a_line(prepare, tmp_path, capsys):
    assert prepare("out") == 1
    assert "raw.json line 42: 'output[0].step' is empty" in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert prepare("out", "--on_error", "skip") == 1
    assert capsys.readouterr().err.endswith("1 of 12 rows are bad, more than --max_error_share 0.01\n")
    assert prepare("out", *SKIP) == 0 and prepare("out", *SKIP) == 1
    assert "answers.jsonl exists: delete it, or choose another --output_dir" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "Another one?", "answer": "1"}])
    assert prepare("more", *SKIP, "--regrade", other, regrade=False) == 1
    assert "no question is one of --regrade" in capsys.readouterr().err
    assert prepare("more", "--regrade", "no.jsonl", regrade=False) == 1
    assert capsys.readouterr().err == "error: --regrade no.jsonl: no such file\n"
    assert run_in_process("prepare_alphamath", "--input", "raw.json") == 1
    assert capsys.readouterr().err == "error: --output_dir is required\n"
