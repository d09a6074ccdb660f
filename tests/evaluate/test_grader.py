"""The grader: math-verify's verdicts, and processes that hang, die or cannot start."""

import os
import re
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe

import pytest

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate import grading as module
from pipa_openrlhf.evaluate.grading import Grader, grader_name

HANGS = "9^{9^{9^{9}}} + x"


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=30, processes=1) as one:
        yield one


@pytest.mark.parametrize(
    "prediction, gold, same",
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("90", r"90^\circ", True),
        (r"90^\circ", "90", True),
        ("east", r"\text{east}", True),
        (r"\text{east}", "east", True),
        (r"\text{west}", "east", False),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(1,3)", False),
        ("(1,2)", "(12)", False),
        ("[1,2)", "(1,2)", False),
        ("1 + x", "x+1", True),
        ("$x+1$", "x + 1", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"4\sqrt(2)", "4", False),
        ("5 or 6", "5", False),
        ("Yes", "72", False),
        ("72", "Yes", False),
        ("1, 234", "1234", False),
        (None, "72", False),
    ],
)
def test_verdicts(grader, prediction, gold, same):
    assert grader.same([(prediction, gold)]) == [same]


def test_gold_comes_first(grader):
    """math-verify is not symmetric: a relation may be answered by its interval, not the other way round."""
    assert grader.same([("(1, 2)", "1 < x < 2"), ("1 < x < 2", "(1, 2)")]) == [True, False]


def test_a_mark_between_digits_never_joins_them(grader):
    marks = ["*", "**", "$", r"\$", "%", r"\%", " ", "^", "x", "}{", "$ $"]
    pairs = [
        (f"{left}{mark}{right}", f"{left}{right}") for mark in marks for left, right in ((3, 4), (12, 0), (70, 15))
    ]
    assert not any(grader.same(pairs))


def test_many_pairs_keep_their_order(grader):
    pairs = [(rf"\frac{{{n}}}{{3}}", rf"\frac{{{n - n % 2}}}{{3}}") for n in range(20)]
    assert grader.same(pairs) == [n % 2 == 0 for n in range(20)]


def test_a_pair_that_hangs_is_wrong_and_the_others_are_graded():
    with Grader(seconds=3, processes=1) as one:
        pairs = [("0.5", r"\frac{1}{2}"), (HANGS, "x + 1"), ("0.25", r"\frac{1}{4}")]
        assert one.same(pairs) == [True, False, True]
        assert one.given_up == 1
        assert one.same(pairs) == [True, False, True] and one.given_up == 1  # known: not tried again
        assert one.same([("0.2", r"\frac{1}{5}"), ("0.3", r"\frac{1}{3}")]) == [True, False] and one.given_up == 1


def test_a_process_that_dies_is_replaced(grader):
    assert grader.same([("0.5", r"\frac{1}{2}")]) == [True]
    os.kill(grader._processes[0]._child.process.pid, signal.SIGKILL)
    grader._processes[0]._child.process.wait()
    assert grader.same([("0.2", r"\frac{1}{5}"), ("0.3", r"\frac{3}{10}")]) == [True, True]
    assert grader.given_up == 0


def test_memory_is_limited(grader):
    assert grader.same([("0.75", r"\frac{3}{4}")]) == [True]
    limits = open(f"/proc/{grader._processes[0]._child.process.pid}/limits").read()
    assert re.search(r"Max address space +4294967296 ", limits)


def test_it_works_off_the_main_thread(grader):
    found = []
    thread = threading.Thread(target=lambda: found.extend(grader.same([("0.125", r"\frac{1}{8}")])))
    thread.start()
    thread.join()
    assert found == [True]


def test_no_process_is_left_behind_and_none_started_in_vain():
    with Grader(processes=2) as one:
        assert one.same([("5", "5"), ("monday", "Monday")]) == [True, True]
        assert [process._child for process in one._processes] == [None, None]
        one.same([("0.5", r"\frac{1}{2}")])
        started = [process._child for process in one._processes if process._child]
    assert len(started) == 1 and started[0].process.poll() == -signal.SIGKILL


def test_a_worker_whose_parent_has_died_ends_by_itself():
    ours, theirs = Pipe()
    code = "from pipa_openrlhf.evaluate import grading; grading._SPARE_SECONDS = 1; grading.compare_pairs(%d, 1)"
    words = [sys.executable, "-c", code % theirs.fileno()]
    with theirs, subprocess.Popen(words, pass_fds=[theirs.fileno()]) as worker:
        assert ours.recv_bytes() == b"true"
        ours.send_bytes(b'["$\\\\boxed{x + 1}$", "$\\\\boxed{9^{9^{9^{9}}} + x}$"]')
        assert worker.wait(60) == -signal.SIGXCPU


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader(processes=1) as one, pytest.raises(UserError, match="does not start"):
        one.same([("0.5", r"\frac{1}{2}")])


def test_a_missing_grader_is_named_before_anything_is_answered(monkeypatch):
    def missing(name):
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(
        UserError, match="^math-verify, which grades answers, is missing: run scripts/install.sh again$"
    ):
        grader_name()


def test_the_name_has_the_version():
    assert grader_name().startswith("math-verify 0.9.0 ")
