"""What runs inside the sandbox: it gives up every right that it still has, then runs the blocks of an answer.

Nothing imports this file. :mod:`pipa_openrlhf.generate.sandbox` starts it as a program of its own, with the standard
library and no more. Whoever changes it: until :func:`give_up_rights` has returned, only what we wrote may run.
"""

import ast
import ctypes
import importlib
import json
import os
import resource
import struct
import sys

PACKAGES = "/packages"
FOLDER = b"/tmp"
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    job = json.load(sys.stdin.buffer)
    null, printed = os.open(os.devnull, os.O_RDWR), os.dup(1)
    os.dup2(null, 0)
    os.dup2(null, 2)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace")
    sys.path[:] = [*(path for path in sys.path if path != "/"), PACKAGES]
    give_up_rights(job)
    os.write(1, job["started"].encode())
    names = {"__name__": "__main__"}
    repeat_random_numbers("\n".join([*job["earlier"], job["code"]]))
    os.dup2(null, 1)
    for block in job["earlier"]:
        run_block(block, names)
    os.dup2(printed, 1)
    run_block(job["code"], names)
    os._exit(job["ended"])  # without waiting for threads


def give_up_rights(job: dict) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    # bwrap could bound the folder's bytes but not its number of files, which take memory of the kernel.
    call("mount", b"tmpfs", FOLDER, b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, job["folder"].encode())
    os.chdir(FOLDER)
    for name, soft_and_hard in job["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(soft_and_hard))
    if os.getuid() == 0:
        # Root is not held to a number of processes, and owns files: become a user whom nobody else is.
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = bytes.fromhex(job["filter"])
    held = ctypes.create_string_buffer(program)
    address = ctypes.addressof(held)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HP", len(program) // 8, address), 0, 0)


def repeat_random_numbers(code: str) -> None:
    """A block that is run again for its variables has to draw the same numbers."""
    for used, module in (("random", "random"), ("numpy", "numpy.random")):
        if used in code:
            try:
                importlib.import_module(module).seed(0)
            except ImportError:
                pass


def run_block(code: str, names: dict) -> None:
    """Run it; the value of a last line that is an expression is printed, and so is an error, both as one line."""
    printed = sys.stdout
    try:
        tree = ast.parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
            if value is not None:
                print(value)
    except SystemExit:
        pass
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=printed)
    sys.stdout = printed
    printed.flush()


if __name__ == "__main__":
    main()
