"""Which tests train or start a process, and about how long they take, read off their code: no list has to be kept."""

import functools
import importlib
import inspect
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import several_runs
import tiny

from pipa_openrlhf.distributed.strategy import Strategy

ROOT = Path(__file__).resolve().parent.parent
# How the docstring of a slow test says how long it takes.
SECONDS = re.compile(r"\b(\d+) seconds\b")
STARTERS = {
    tiny.train,
    tiny.run_in_process,
    tiny.start_module,
    several_runs.TwoRanks,
    subprocess.run,
    subprocess.Popen,
    Strategy,
}


def trains(item) -> bool:
    """Whether a collected test reaches a starter, itself or by its fixtures."""
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    return any(reaches_a_starter(function) for function in (item.function, *fixtures))


def seconds_of_files(items) -> Counter[Path]:
    """About how long the tests of each file take: slow ones say it for all their parameters, one that trains takes
    about a second."""
    seconds: Counter[Path] = Counter()
    slow = {}
    for item in items:
        if item.get_closest_marker("slow"):
            slow[item.function] = item.path
        else:
            seconds[item.path] += 1 if item.get_closest_marker("trains") else 0.02
    for function, path in slow.items():
        seconds[path] += int(SECONDS.search(function.__doc__)[1])
    return seconds


@functools.cache
def reaches_a_starter(start: Callable) -> bool:
    """Whether a function names a starter, or a function of the tests or the package that does, and so on."""
    seen, left = set(), [start]
    while left:
        one = _unwrapped(left.pop())
        if one in STARTERS:
            return True
        if one not in seen and isinstance(one, FunctionType) and Path(one.__code__.co_filename).is_relative_to(ROOT):
            seen.add(one)
            left += _used(one)
    return False


def _unwrapped(function: Callable) -> Callable:
    if hasattr(function, "hypothesis"):
        function = function.hypothesis.inner_test
    return inspect.unwrap(function)


@functools.cache
def _used(function: FunctionType) -> list[Callable]:
    """The functions and classes that a function names, as ``train`` or ``tiny.train``, or imports."""
    names = _names(function.__code__)
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    found += [importlib.import_module(name) for name in names if name.startswith("pipa_openrlhf.") or _is_ours(name)]
    of_modules = [vars(one)[name] for one in found if isinstance(one, ModuleType) for name in names & vars(one).keys()]
    return [one for one in found + of_modules if isinstance(one, FunctionType | type)]


def _is_ours(name: str) -> bool:
    """Whether it is a module beside this file."""
    return (ROOT / "tests" / f"{name}.py").is_file()


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
