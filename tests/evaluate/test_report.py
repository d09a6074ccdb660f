"""The report: its numbers are those of the evaluations, and its page stands alone."""

import json
import math

import pytest

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.report import main
from pipa_openrlhf.evaluate.report import accuracy_bars, comparison
from pipa_openrlhf.evaluate.results import one_line, summarise, text_table, wilson_interval, write_summary


def evaluation(folder, rights, grader=None):
    folder.mkdir()
    rows = [
        {"problem_id": str(index), "right": bool(right), "predicted": "1", "finished": True}
        for index, right in enumerate(rights)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_summary(str(folder), summarise(rows, {"model": folder.name} | ({"grader": grader} if grader else {})))
    return str(folder)


def training(folder, steps=30):
    folder.mkdir()
    rows = [
        {
            "step": step,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "pipa/value_likelihood": 0.5 + step / 100,
            "rewards/chosen": step / 10,
            "rewards/rejected": None if step == 3 else -step / 10,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "torn')
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    base = [1, 0, 0, 0] * 25
    better = [1, 1, 0, 0] * 25
    return {"SFT": evaluation(tmp_path / "sft", base), "PIPA-M": evaluation(tmp_path / "m", better)}


def test_comparison_with_the_interval_of_the_paired_difference(folders):
    header, sft, pipa = comparison(folders, "SFT")
    assert header[4] == "against SFT"
    assert sft[:4] == ("SFT", "25.0%", "17.5% to 34.3%", "100") and sft[4:] == ("", "", "")
    # differences: 25 ones and 75 zeros; variance 25 * 75 / (100 * 99)
    half = 196 * math.sqrt(25 * 75 / 9900 / 100)
    assert pipa == (
        "PIPA-M",
        "50.0%",
        "40.4% to 59.6%",
        "100",
        "+25.0 points",
        f"+{25 - half:.1f} to +{25 + half:.1f}",
        "6e-08",  # 2 / 2^25: all 25 problems that one alone solves are its
    )


def test_no_difference_where_the_problems_are_others(folders, tmp_path):
    rows = comparison(folders | {"other": evaluation(tmp_path / "other", [1, 0])}, "SFT")
    assert rows[3] == ("other", "50.0%", "9.5% to 90.5%", "2", "", "", "")


def test_several_answers_are_compared_by_their_majority(tmp_path):
    def several(name, *answers):
        """Each a problem of three answers, ``(vote, right)``."""
        (tmp_path / name).mkdir()
        rows = [
            {
                "problem_id": str(index),
                "sample": sample,
                "right": right,
                "predicted": "1",
                "vote": vote,
                "finished": True,
            }
            for index, of_problem in enumerate(answers)
            for sample, (vote, right) in enumerate(of_problem)
        ]
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_summary(str(tmp_path / name), summarise(rows, {}))
        return str(tmp_path / name)

    solved, unsolved = [(0, True), (1, False), (0, True)], [(0, True), (1, False), (1, False)]
    folders = {"a": several("a", *[unsolved] * 6, solved), "b": several("b", *[solved] * 6, unsolved)}
    _, a, b = comparison(folders, "a")
    assert a[:2] == ("a (maj@3)", "14.3%") and b[:2] == ("b (maj@3)", "85.7%")
    assert b[4] == "+71.4 points" and b[6] == "0.125"  # 2 * (1 + 7) / 2^7


def test_different_graders_are_not_compared(folders, tmp_path, capsys):
    summary = json.loads(open(f"{folders['SFT']}/summary.json").read())
    write_summary(folders["SFT"], summary | {"grader": "other 2.0"})
    flags = ["--report.evaluations", *(f"{name}={folder}" for name, folder in folders.items())]
    assert run(main, "report", [*flags, "--report.output", str(tmp_path / "report.html")]) == 1
    error = capsys.readouterr().err
    assert "SFT was graded by other 2.0 and PIPA-M by a version" in error and error.count("\n") == 1


def test_text_table_is_aligned(folders):
    lines = text_table(comparison(folders, "SFT")).splitlines()
    assert len(lines) == 4 and set(lines[1]) == {"-"}
    assert lines[2].index("25.0%") == lines[3].index("50.0%")


@pytest.mark.parametrize("n", [3, 12, 24, 600])
def test_models_that_solve_nothing_or_everything_are_drawn(n):
    for right in (0, n):
        summary = {"accuracy": right / n, "interval_95": list(wilson_interval(right, n)), "n": n}
        assert f">{100 * right / n:.1f}<" in accuracy_bars({"a": summary})


def test_every_table_names_the_grader(tmp_path, capsys):
    folder = evaluation(tmp_path / "a", [1, 0], "math-verify 0.9.0")
    assert (
        run(main, "report", ["--report.evaluations", f"a={folder}", "--report.output", str(tmp_path / "r.html")]) == 0
    )
    for text in (capsys.readouterr().out, (tmp_path / "r.html").read_text()):
        assert "Graded by math-verify 0.9.0." in text and "McNemar" in text


def test_command_writes_a_page_that_stands_alone(folders, tmp_path, capsys):
    commands = tmp_path / "commands.txt"
    commands.write_text("python -m x --flag '<a> & b'")
    output = tmp_path / "deep" / "report.html"
    flags = ["--report.evaluations", *(f"{name}={folder}" for name, folder in folders.items())]
    flags += ["--report.runs", f"PIPA-M={training(tmp_path / 'run')}", "--report.output", str(output)]
    assert run(main, "report", [*flags, "--report.commands", str(commands), "--report.title", "A <title>"]) == 0
    assert "+25.0 points" in capsys.readouterr().out
    page = output.read_text()
    for text in ("25.0%", "50.0%", "+25.0 points", "&lt;a&gt; &amp; b", "A &lt;title&gt;", "PIPA-M"):
        assert text in page
    assert page.count("<svg") == 3
    for loaded_from_elsewhere in ("<script", "<link", "<img", "@import"):
        assert loaded_from_elsewhere not in page


TREE = {
    "problem_id": "7",
    "question": "1 < 2?",
    "gold": "yes",
    "ranked_by": "head",
    "answer": 3,
    "nodes": [
        {"parent": None, "text": "", "value": 0.5, "fate": "root"},
        {"parent": 0, "text": "1 & 2\n", "value": 0.25, "fate": "kept"},
        {"parent": 0, "text": "no\n", "value": 0.0, "fate": "worse"},
        {"parent": 1, "text": "yes", "value": 1.0, "fate": "finished"},
    ],
}


def test_a_search_is_drawn(folders, tmp_path):
    path, output = tmp_path / "7.json", tmp_path / "report.html"
    path.write_text(json.dumps(TREE))
    flags = ["--report.evaluations", f"SFT={folders['SFT']}", "--report.output", str(output)]
    assert run(main, "report", [*flags, "--report.trees", str(path), "--report.pictures", str(tmp_path / "p")]) == 0
    page = output.read_text()
    assert "Search of problem 7" in page and "The right answer is yes." in page
    lines = [
        ("answer", 60, "0.500", "1 &lt; 2?", "root"),
        ("answer", 30, "0.250", "1 &amp; 2", "kept"),
        ("answer", 120, "1.000", "yes", "finished"),
        ("over", 0, "0.000", "no", "worse"),
    ]
    places = [
        page.index(
            f'<li class="{kind}"><span class="value" style="background:hsl({hue} 60% 80%)">{value}</span>'
            f'<span class="step">{text}</span> <span class="fate">{fate}</span>'
        )
        for kind, hue, value, text, fate in lines
    ]
    assert places == sorted(places), "what continues a step stands below it, and before its next sibling"
    assert [one.name for one in (tmp_path / "p").iterdir()] == ["accuracy.svg"]
    other = [*flags, "--report.trees", str(tmp_path / "sft" / "summary.json")]
    assert run(main, "report", other) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--report.evaluations is required"),
        (["--report.evaluations", "SFT"], "NAME=FOLDER"),
        (["--report.evaluations", "a=/nowhere"], "/nowhere"),
    ],
)
def test_refusals(flags, words, capsys):
    assert run(main, "report", flags) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_refuses_an_unknown_baseline_a_name_twice_and_a_run_without_metrics(folders, tmp_path, capsys):
    sft = f"SFT={folders['SFT']}"
    for flags, words in (
        ([sft, "--report.baseline", "x"], "--report.baseline x"),
        ([sft, sft], "twice"),
        ([sft, "--report.runs", f"r={tmp_path}"], "metrics.jsonl"),
    ):
        assert run(main, "report", ["--report.evaluations", *flags]) == 1
        assert words in capsys.readouterr().err


def test_one_line_of_a_summary():
    rows = [
        {"problem_id": str(number), "right": number < 81, "predicted": None, "finished": False}
        for number in range(263)
    ]
    assert one_line(summarise(rows, {})) == (
        "accuracy 30.8% (81 of 263), 95 % interval 25.5% to 36.6%; 263 without an answer"
    )
