"""Each row of ``escapes.py`` is contained, and nothing of it stays.

All rows run in one process, several at a time, with harmless code between them. Half of them are tried twice: as they
will run, and without the filter of system calls, so that namespaces, mounts and limits are seen to hold by themselves.
"""

import os
import re
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from escapes import BARE, TABLE, Escape

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.sandbox import Execution, Limits, Sandbox

LIMITS = Limits(
    cpu_seconds=1,
    wall_seconds=2.0,
    memory_mb=256,
    threads=8,
    folder_mb=2,
    folder_files=64,
    open_files=32,
    printed_bytes=100_000,
)


@pytest.fixture(scope="module")
def sandbox():
    try:
        made = Sandbox(LIMITS)
    except UserError as error:
        pytest.skip(f"no sandbox here: {error}")
    # A word by which its processes are found on the machine.
    made._command[made._command.index("sandbox")] = f"sandbox-{uuid.uuid4()}"
    return made


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What is to be found: a port, sockets, a file, an environment, the entries of the home folder."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("ESCAPED")
    name = f"pipa-{uuid.uuid4()}"
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(1) as unix, socket.socket(1) as abstract:
        unix.bind(str(folder / "socket"))
        abstract.bind("\0" + name)
        unix.listen()
        abstract.listen()
        home = [str(path) for path in Path.home().iterdir() if not Path(sys.base_prefix).is_relative_to(path)]
        words = {"PORT": str(port.getsockname()[1]), "FOLDER": str(folder), "NAME": name}
        os.environ["ESCAPED_SECRET"] = "ESCAPED"
        yield {**words, "HOME": repr(home), "EVALUATOR": str(os.getpid())}
        del os.environ["ESCAPED_SECRET"]
        for listening in (port, unix, abstract):
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()


def number_of(call: str) -> str:
    import pyseccomp

    return str(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call))


def run_all(sandbox: Sandbox, host: dict, escapes: list[Escape], between: bool) -> dict[str, Execution]:
    """Four at a time; ``between``: with code that does nothing wrong after each, which has to be answered as ever."""

    def one(escape: Escape) -> Execution:
        code = re.sub(r"NUMBER\((\w+)\)", lambda found: number_of(found[1]), escape.code)
        code = re.sub("|".join(host), lambda found: host[found[0]], code)
        result = sandbox.run(code)
        assert not between or sandbox.run("x + 1", ["x = 41"]) == Execution("42", True), escape.name
        return result

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((escape.name for escape in escapes), pool.map(one, escapes)))


@pytest.fixture(scope="module")
def results(sandbox, host):
    return run_all(sandbox, host, TABLE, between=True)


@pytest.fixture(scope="module")
def bare_results(sandbox, host):
    import pyseccomp

    with open(os.memfd_create("all"), "w+b") as file:
        pyseccomp.SyscallFilter(pyseccomp.ALLOW).export_bpf(file)
        file.seek(0)
        open_filter = file.read()
    unfiltered = Sandbox(LIMITS)
    unfiltered._command, unfiltered._filter = sandbox._command, open_filter
    return run_all(unfiltered, host, BARE, between=False)


def left_over(sandbox: Sandbox) -> list[str]:
    """Processes of it that live on the machine. The first process of a namespace lives as long as any in it."""
    word = next(word for word in sandbox._command if word.startswith("sandbox-"))
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found += [entry.name] if entry.name.isdigit() and word in (entry / "cmdline").read_text() else []
        except OSError:
            continue  # it has just ended
    return found


def assert_nothing_is_left(sandbox: Sandbox) -> None:
    for _ in range(100):
        if not left_over(sandbox):
            return
        time.sleep(0.05)
    assert left_over(sandbox) == []


def test_the_table_has_every_name_once():
    assert len({escape.name for escape in TABLE}) == len(TABLE) > 100


@pytest.mark.parametrize("escape", TABLE, ids=lambda escape: escape.name)
def test_an_escape_is_contained(escape, results):
    assert "ESCAPED" not in results[escape.name].output
    assert re.search(escape.seen, results[escape.name].output), results[escape.name]


@pytest.mark.parametrize("escape", BARE, ids=lambda escape: escape.name)
def test_an_escape_is_contained_without_the_filter_of_system_calls(escape, bare_results):
    assert "ESCAPED" not in bare_results[escape.name].output
    assert re.search(escape.bare, bare_results[escape.name].output), bare_results[escape.name]


def test_nothing_is_left_running(sandbox, results, bare_results):
    assert_nothing_is_left(sandbox)


def test_nothing_is_left_when_the_evaluator_is_killed(sandbox):
    program = (
        "import sys\nfrom pipa_openrlhf.generate.sandbox import Sandbox\nmade = Sandbox()\n"
        f"made._command = {sandbox._command!r}\nprint('ready', flush=True)\nmade.run('import time; time.sleep(600)')"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as evaluator:
        evaluator.stdout.readline()
        while len(left_over(sandbox)) < 2:  # bwrap, and the first process of the namespace
            assert evaluator.poll() is None
            time.sleep(0.05)
        evaluator.kill()
    assert_nothing_is_left(sandbox)
