"""Runs Python code that a model wrote, where it can do no harm: docs/sandbox.md says what is kept from it, and how.

Every run is a new process in namespaces of its own, made by bubblewrap, which sees an interpreter and an empty folder.
The variables of an answer's earlier code are there because that code is run again first, silently, as AlphaMath does:
candidates that continue the same answer cannot meet in one process, and nothing lives between steps.
"""

import errno
import importlib.util
import json
import math
import os
import random
import re
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.inside_sandbox import PACKAGES

INSIDE = Path(__file__).with_name("inside_sandbox.py")
# Beside the standard library, where they are installed.
OFFERED = ("sympy", "mpmath", "numpy", "scipy")
# The exit status by which the inside says that a block came to its end, and what it prints before the first one.
ENDED = 77
STARTED = "\n"
START_SECONDS = 60
# User ids that no account has. One for each run: the kernel counts a user's processes.
USER_IDS = range(1 << 30, 1 << 31)
# The layout's own tags, which would end the <output> they stand in, or look like what the model wrote.
TAGS = re.compile(r"<(/?)(question|step|p|code|output)>", re.IGNORECASE)
# Control characters, unusual white space, and what are no characters, by which special_text.py marks text.
CONTROL = re.compile(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

# What an interpreter with threads needs, and no more: no sockets, no processes, no signals to others, no pipes.
# Anything else is answered as if the kernel did not know it, which the C library knows how to do without.
SYSTEM_CALLS = """
brk mmap munmap mprotect mremap madvise
read readv pread64 write writev pwrite64 lseek open openat close dup dup2 dup3 fcntl
fstat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd chdir
mkdir mkdirat unlink unlinkat rmdir rename renameat renameat2 symlink symlinkat ftruncate fsync fadvise64
exit exit_group getpid gettid getppid getuid geteuid getgid getegid getrusage getrlimit times uname sysinfo
futex set_robust_list set_tid_address rseq sched_yield sched_getaffinity getcpu arch_prctl
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack tgkill setitimer alarm restart_syscall
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time poll ppoll select pselect6 getrandom
""".split()
# Of ioctl: is it a terminal, how wide is it, and close-on-exec.
IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451)
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020000


@dataclass(frozen=True)
class Limits:
    """Of one run, which is all of an answer's code up to and with the block that is asked for.

    Attributes:
        cpu_seconds: of all threads together. It decides for code that computes: how long that takes by the clock
            depends on what else the machine does.
        wall_seconds: after which the sandbox is killed.
        memory_mb: of address space.
        threads: with the first one.
        folder_mb: of the files in its folder, and of any one file.
        folder_files: files and folders there.
        open_files: at a time.
        printed_bytes: after which it is killed.
        shown_chars: of what it printed, the middle of longer text is left out.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_mb: int = 1024
    threads: int = 16
    folder_mb: int = 16
    folder_files: int = 256
    open_files: int = 64
    printed_bytes: int = 1 << 20
    shown_chars: int = 500


@dataclass(frozen=True)
class Execution:
    """``output``: what is shown to the model. ``ended``: the block came to its end, perhaps by an error, so that its
    variables are known; one that was killed is not run again."""

    output: str
    ended: bool


class Sandbox:
    """Raises UserError, in one line, where this machine cannot contain code."""

    def __init__(self, limits: Limits = Limits()):  # noqa: B008
        self.limits = limits
        self._command = _command()
        self._filter = system_call_filter()
        try:
            works = self.run("print(6 * 7)") == Execution("42", True)
            failure = "a first test of it gave a wrong result"
        except SandboxError as error:
            works, failure = False, str(error)
        if not works:
            raise UserError(
                f"--sbs.execute_code: the sandbox does not start ({failure}): allow namespaces "
                "(sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces, "
                "kernel.apparmor_restrict_unprivileged_userns=0; in a container --privileged), or leave the flag out"
            )

    def run(self, code: str, earlier: Sequence[str] = ()) -> Execution:
        """Run a block.

        Args:
            code: Python.
            earlier: blocks of the same answer that ended, in order. What they print is not shown again.

        Raises:
            SandboxError: the sandbox itself failed, so that nothing was run.
        """
        job = json.dumps(self._job(code, earlier)).encode()
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
            given.write(job)
            given.seek(0)
            process = subprocess.Popen(
                self._command,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env={},
                cwd="/",
                start_new_session=True,
            )
            printed, stopped = self._read(process)
            complaints.seek(0)
            if not printed.startswith(STARTED.encode()):
                said = complaints.read(2000).decode(errors="replace").strip().splitlines()
                raise SandboxError(said[-1] if said else f"no answer, exit status {process.returncode}")
        ended = process.returncode == ENDED and stopped is None
        reason = None if ended else stopped or self._reason(process.returncode)
        return Execution(as_output(printed[len(STARTED) :], reason, self.limits.shown_chars), ended)

    def _job(self, code: str, earlier: Sequence[str]) -> dict:
        limits, megabyte = self.limits, 1 << 20
        return {
            "code": code,
            "earlier": list(earlier),
            "filter": self._filter.hex(),
            "user": random.SystemRandom().choice(USER_IDS),
            "started": STARTED,
            "ended": ENDED,
            "folder": f"size={limits.folder_mb}m,nr_inodes={limits.folder_files + 1},mode=1777",
            "limits": {
                "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),  # SIGXCPU can be ignored, SIGKILL cannot
                "RLIMIT_AS": (limits.memory_mb * megabyte,) * 2,
                "RLIMIT_NPROC": (limits.threads,) * 2,
                "RLIMIT_FSIZE": (limits.folder_mb * megabyte,) * 2,
                "RLIMIT_NOFILE": (limits.open_files,) * 2,
                "RLIMIT_CORE": (0,) * 2,
            },
        }

    def _read(self, process: subprocess.Popen) -> tuple[bytes, str | None]:
        """What it printed until its end, and why it was killed before that."""
        deadline = time.monotonic() + START_SECONDS
        out: IO[bytes] = process.stdout  # type: ignore[assignment]
        printed = b""
        try:
            with out, selectors.DefaultSelector() as selector:
                selector.register(out, selectors.EVENT_READ)
                while selector.select(max(0.0, deadline - time.monotonic())):
                    chunk = os.read(out.fileno(), 1 << 16)
                    if not chunk:
                        break
                    if not printed:
                        deadline = time.monotonic() + self.limits.wall_seconds
                    printed += chunk
                    if len(printed) > self.limits.printed_bytes:
                        return printed, f"the code printed more than {self.limits.printed_bytes} bytes"
                process.wait(max(0.0, deadline - time.monotonic()))
                return printed, None
        except subprocess.TimeoutExpired:
            return printed, f"TimeoutError: the code took longer than {self.limits.wall_seconds:g} seconds"
        finally:
            # With it dies the first process of the namespace, and with that one all that is in there.
            process.kill()
            process.wait()

    def _reason(self, status: int) -> str:
        if status == 128 + signal.SIGXCPU:
            return f"TimeoutError: the code computed for longer than {self.limits.cpu_seconds} seconds"
        return "the code ended the interpreter"


class SandboxError(RuntimeError):
    """The sandbox did not start; says nothing about the code."""


def as_output(printed: bytes, reason: str | None, shown_chars: int) -> str:
    """Printed bytes, and why they end early, as text that can stand in an ``<output>`` and cannot end it.

    Bytes that are no text and control characters become U+FFFD, and the layout's tags get square brackets.
    """
    text = printed.decode("utf-8", errors="replace").replace("\r\n", "\n")
    text = TAGS.sub(r"[\1\2]", CONTROL.sub("\ufffd", text)).strip()
    if len(text) > shown_chars:
        text = f"{text[: math.ceil(shown_chars / 2)]}...{text[-(shown_chars // 2) :]}"
    return "\n".join(line for line in (text, reason) if line)


def system_call_filter() -> bytes:
    """The program, of struct sock_filter, that the kernel asks about each system call.

    Raises:
        UserError: libseccomp, or its Python binding, is not installed.
    """
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--sbs.execute_code needs libseccomp ({error}): apt-get install libseccomp2, pip install pyseccomp"
        ) from None
    allow, equal = pyseccomp.ALLOW, pyseccomp.EQ
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in SYSTEM_CALLS:
        try:
            rules.add_rule(allow, name)
        except ValueError:
            pass  # this kind of machine, or an older libseccomp, has no such call
    for request in IOCTLS:
        rules.add_rule(allow, "ioctl", pyseccomp.Arg(1, equal, request))
    # Limits may be looked at; and new threads, but neither processes nor namespaces, be made.
    rules.add_rule(allow, "prlimit64", pyseccomp.Arg(2, equal, 0))
    rules.add_rule(
        allow, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD | CLONE_NAMESPACES, CLONE_THREAD)
    )
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _command() -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError("--sbs.execute_code needs bubblewrap (bwrap): apt-get install bubblewrap")
    # Root needs no namespace of users, and is a user of its own inside; others have no rights outside to begin with.
    if os.getuid() == 0:
        users = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        users = ["--unshare-user"]
    namespaces = [f"--unshare-{name}" for name in ("pid", "net", "ipc", "uts", "cgroup-try")]
    environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    return [
        *(bwrap, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", *namespaces),
        *("--cap-drop", "ALL", *users, "--cap-add", "CAP_SYS_ADMIN"),
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *_interpreter_mounts(),
        *("--ro-bind", str(INSIDE), "/inside.py"),
        *(
            "--perms",
            "0755",
            "--dir",
            "/tmp",
            "--perms",
            "0755",
            "--dir",
            "/dev",
            "--dev-bind",
            "/dev/null",
            "/dev/null",
            "--remount-ro",
            "/",
            "--chdir",
            "/",
        ),
        *("--", _interpreter(), "-S", "-s", "-B", "/inside.py"),
    ]


def _interpreter() -> str:
    # In a virtual environment the one that it was made from.
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _interpreter_mounts() -> list[str]:
    """bwrap's words for the interpreter, the libraries it is linked with, and the packages that are offered."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    standard = {sysconfig.get_path(name, vars=bases) for name in ("stdlib", "platstdlib")}
    own = standard if sys.base_prefix == "/usr" else {f"{sys.base_prefix}/lib", *standard}
    multiarch = sysconfig.get_config_var("MULTIARCH")
    narrow = [f"/usr/lib/{multiarch}", f"/lib/{multiarch}"] if multiarch else []
    system = narrow if narrow and os.path.isdir(narrow[0]) else ["/usr/lib", "/lib"]
    seen = [_interpreter(), *sorted(own), *system, "/usr/lib64", "/lib64", "/etc/ld.so.cache"]
    mounts: list[tuple[str, ...]] = [
        ("--ro-bind", path, path) for path in seen if os.path.exists(path) and os.path.realpath(path) == path
    ]
    # Packages beside the standard library are not part of it, and whatever else is there is nobody's business.
    hidden = [path for path in sorted(f"{folder}/site-packages" for folder in standard) if os.path.isdir(path)]
    mounts += [words for path in hidden for words in (("--tmpfs", path), ("--remount-ro", path))]
    for name in OFFERED:
        found = importlib.util.find_spec(name)
        for path in (found.submodule_search_locations or []) if found else []:
            folders = [folder for folder in (path, f"{path}.libs") if os.path.isdir(folder)]
            mounts += [("--ro-bind", folder, f"{PACKAGES}/{os.path.basename(folder)}") for folder in folders]
    links = [("--symlink", os.readlink(link), link) for link in ("/lib", "/lib64") if os.path.islink(link)]
    # bwrap would make these for root alone.
    folders = sorted({str(parent) for words in mounts for parent in Path(words[-1]).parents} - {"/"})
    made = [("--perms", "0755", "--dir", folder) for folder in folders if folder not in (link[-1] for link in links)]
    return [word for words in [*made, *links, *mounts] for word in words]
