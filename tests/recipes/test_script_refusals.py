"""What the scripts refuse: one line before anything is installed, made or run."""

import pytest

LOOP_FLAGS = "--start, --seed or --work)"
NO_QUICKSTART = "EMPTY has no finished quickstart: run bash scripts/quickstart.sh with the same --fast and --work"


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("quickstart.sh", ["--slow"], "unknown argument --slow (use --fast, --seed NUMBER or --work FOLDER)"),
        ("compare_objectives.sh", ["--slow"], "unknown argument --slow (use --fast, --work FOLDER or --lr RATE)"),
        ("compare_objectives.sh", ["--work", "EMPTY"], NO_QUICKSTART),
        (
            "compare_search.sh",
            ["--slow"],
            "unknown argument --slow (use --fast, --work FOLDER, --problems NUMBER or --grid)",
        ),
        ("compare_search.sh", ["--work", "EMPTY"], NO_QUICKSTART),
        (
            "iterative.sh",
            ["--slow"],
            f"unknown argument --slow (use --fast, --rounds, --prior, --annotate, {LOOP_FLAGS}",
        ),
        ("iterative.sh", ["--prior", "last", "--start", "x"], "--prior last is not previous or first"),
        ("iterative.sh", ["--start", "x", "--prior"], "--prior  is not previous or first"),
        ("iterative.sh", ["--annotate", "guess", "--start", "x"], "--annotate guess is not words, rule or rollout"),
        ("iterative.sh", ["--rounds", "two"], "--rounds two is no number of rounds"),
        ("verifiable.sh", ["--prior"], f"unknown argument --prior (use --fast, --rounds, {LOOP_FLAGS}"),
        ("verifiable.sh", ["--rounds", "0"], "--rounds 0 is no number of rounds"),
    ],
)
def test_a_mistake_is_one_line(run_script, tmp_path, script, words, message):
    done = run_script(script, *(word.replace("EMPTY", str(tmp_path)) for word in words), timeout=20)
    expected = f"error: {message}\n".replace("EMPTY", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["quickstart.sh", "compare_search.sh", "iterative.sh", "verifiable.sh"])
def test_a_flag_without_its_value_is_refused(run_script, script):
    done = run_script(script, "--work", timeout=20)
    assert done.returncode != 0 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.endswith("--work needs a folder")
