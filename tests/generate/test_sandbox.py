"""What the sandbox answers, and what is said where there can be none. test_sandbox_escapes.py: that it holds."""

import random
import shutil
import sys
from pathlib import Path

import pytest

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate import sandbox as module
from pipa_openrlhf.generate.sandbox import Execution, Limits, Sandbox, as_output


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox()
    except UserError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(1)\nprint(2)", "1\n2"),
        ("x = 6\nx * 7", "42"),
        ("print('a')\n'b'", "a\nb"),
        ("print('a')\nNone", "a"),
        ("x = 3", ""),
        ("for i in range(2):\n    print(i)", "0\n1"),
        ("print('a')\n1 / 0", "a\nZeroDivisionError: division by zero"),
        ("def f(n):\n    return n and n * f(n - 1) or 1\nf(5)", "120"),
        ("from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 4, x))", "[-2, 2]"),
        ("import numpy as np\nprint(np.linalg.det(np.eye(2) * 3).round())", "9.0"),
        ("print('größer ∑')", "größer ∑"),
    ],
)
def test_a_block_answers_what_it_printed_and_the_value_of_its_last_line(sandbox, code, output):
    assert sandbox.run(code) == Execution(output, True)


def test_variables_imports_and_files_of_earlier_blocks_are_there_and_their_output_is_not(sandbox):
    earlier = [
        "import math\nx = 5\nprint('first')",
        "import os\ny = math.factorial(x)\nos.write(1, b'second')\nopen('kept', 'w').write('z')\ny",
        "x = 7\nundefined",
        "def f():\n    return x + y",
    ]
    assert sandbox.run("print(f(), open('kept').read(), math.pi > 3)", earlier) == Execution("127 z True", True)
    assert sandbox.run("y").output == "NameError: name 'y' is not defined"


def test_a_block_that_did_not_end_says_so(sandbox):
    assert sandbox.run("import os\nprint('x', flush=True)\nos._exit(0)") == Execution(
        "x\nthe code ended the interpreter", False
    )


def test_the_limits_count_for_all_code_of_an_answer():
    try:
        short = Sandbox(Limits(cpu_seconds=1))
    except UserError as error:
        pytest.skip(f"no sandbox here: {error}")
    busy = "import time\nwhile time.process_time() < 0.5:\n    pass"
    assert short.run("print(1)", [busy]) == Execution("1", True)
    result = short.run("while True:\n    pass", [busy])
    assert result == Execution("TimeoutError: the code computed for longer than 1 seconds", False)


def test_random_numbers_and_the_order_of_sets_are_the_same_when_a_block_runs_again(sandbox):
    block = "import random\nimport numpy\nx = random.random(), numpy.random.rand(), list(set('abcdefgh'))"
    first = sandbox.run(f"{block}\nx").output
    assert sandbox.run("x", [block]).output == first != ""


def test_the_middle_of_long_output_is_left_out():
    assert as_output(b"abcdefghijk", None, 5) == "abc...jk"
    assert as_output(b"abcde\n", "stopped", 5) == "abcde\nstopped"


@pytest.mark.parametrize("tag", ["output", "step", "p", "code", "question"])
def test_a_tag_of_the_layout_in_the_output_is_no_tag(tag):
    text = as_output(f"a<{tag}>b</{tag}>".encode(), None, 500)
    assert text == f"a[{tag}]b[/{tag}]"


def test_bytes_that_are_no_text_and_control_characters_are_replaced():
    assert as_output(b"a\xff\x00\x1b[1m\tb\r\nc\xe2\x80\xa8", None, 500) == "a\ufffd\ufffd\ufffd[1m\tb\nc\ufffd"


def test_a_machine_without_bubblewrap_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        Sandbox()


def test_a_machine_without_libseccomp_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(UserError, match="apt-get install libseccomp2"):
        Sandbox()


def test_a_machine_that_forbids_namespaces_is_told_so_in_one_line(monkeypatch, tmp_path):
    pytest.importorskip("pyseccomp")
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho bwrap: No permissions to create new namespace >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(bwrap))
    with pytest.raises(
        UserError, match="does not start .bwrap: No permissions to create new namespace.: allow"
    ) as error:
        Sandbox()
    assert "\n" not in str(error.value)


def test_a_sandbox_that_stops_working_is_no_output_of_the_code(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "_command", ["/bin/false"])
    with pytest.raises(module.SandboxError, match="exit status 1"):
        sandbox.run("print(1)")


def test_every_run_of_root_has_a_user_of_its_own(sandbox):
    users = {sandbox._job("", [])["user"] for _ in range(50)}
    assert len(users) == 50 and min(users) > 1 << 29
    random.seed(1)
    first = sandbox._job("", [])["user"]
    random.seed(1)
    assert sandbox._job("", [])["user"] != first, "a run's seed has no say in it"


def test_what_runs_inside_needs_the_standard_library_alone():
    text = Path(module.INSIDE).read_text()
    imported = [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert imported and set(imported) <= sys.stdlib_module_names
