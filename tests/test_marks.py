"""The mark `trains` and the filter of warnings, on functions and modules made here; what the mark `slow` asks for."""

import ast
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from marks import ROOT, SECONDS, reaches_a_starter, seconds_of_files, trains
from tiny import flags, make_model


def direct():
    tiny.train("train_sft")


def through_a_helper():
    return [direct() for _ in range(2)]


@contextmanager
def in_a_context():
    yield through_a_helper()


def uses_the_context():
    with in_a_context():
        pass


def by_an_import_within():
    from pipa_openrlhf.cli.train_sft import main

    main(None)


def on_two_ranks_by_an_import_within():
    from several_runs import TwoRanks

    TwoRanks(ROOT)


def a_process():
    subprocess.run(["true"])


@given(st.integers())
def with_examples(_number):
    direct()


def calls_itself(depth=1):
    return calls_itself(depth - 1) if depth else make_model(0)


def no_training():
    return flags({"train": "a word, not a call"})


@pytest.mark.parametrize(
    "function",
    [
        direct,
        through_a_helper,
        uses_the_context,
        by_an_import_within,
        on_two_ranks_by_an_import_within,
        a_process,
        with_examples,
    ],
)
def test_what_reaches_a_starter_is_marked(function):
    assert reaches_a_starter(function)


@pytest.mark.parametrize("function", [calls_itself, no_training, make_model])
def test_what_reaches_none_is_not(function):
    assert not reaches_a_starter(function)


def collected(function, fixture):
    """What pytest collects, as far as it matters here: the second of two fixtures of one name is the one used."""
    fixtures = {"data": [SimpleNamespace(func=direct), SimpleNamespace(func=fixture)]}
    return SimpleNamespace(function=function, _fixtureinfo=SimpleNamespace(name2fixturedefs=fixtures))


def test_fixtures_count_as_well(request):
    assert trains(collected(no_training, through_a_helper))
    assert trains(collected(direct, no_training))
    assert not trains(collected(no_training, no_training))
    assert request.node.get_closest_marker("trains"), "it names a starter itself"


def test_the_others_have_no_mark(request):
    assert not request.node.get_closest_marker("trains")


def test_files_whose_tests_take_longest_are_known():
    def for_each():
        """For all together 90 seconds."""

    def item(path: str, *marks: str):
        return SimpleNamespace(path=path, function=for_each, get_closest_marker=lambda mark: mark in marks)

    seconds = seconds_of_files([item("a.py")] * 10 + [item("b.py", "trains")] + [item("c.py", "slow")] * 2)
    assert sorted(seconds, key=seconds.get) == ["a.py", "b.py", "c.py"] and seconds["c.py"] == 90


SLOW = {
    f"{path.relative_to(ROOT)}::{node.name}": node
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_test_states_its_seconds(name):
    assert SECONDS.search(ast.get_docstring(SLOW[name]) or ""), name


def test_the_mark_slow_stands_on_functions_alone():
    """Elsewhere its seconds would not be asked for."""
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_marks.py")
    assert len(SLOW) == text.count("mark.slow") > 0


@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning])
def test_a_warning_that_points_at_the_package_is_an_error(category):
    source = compile("import warnings\ndef work(kind): warnings.warn('old', kind)", "ours.py", "exec")
    ours, theirs = ({"__name__": name} for name in ("pipa_openrlhf.data.made_here", "torch.made_here"))
    exec(source, ours)
    exec(source, theirs)
    with pytest.raises(category, match="old"):
        ours["work"](category)
    if category is not UserWarning:
        theirs["work"](category)
