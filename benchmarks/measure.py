"""What the benchmarks share: time, FLOPs and memory of a stretch of work, the machine, tables, JSON, verdicts."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

GIB = 2**30
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "openrlhf", "trl")


class PeakMemory:
    """Peak bytes since ``reset``: of the accelerator where there is one, else resident memory above that at creation.

    Create it after the imports and before any model is loaded.
    """

    def __init__(self):
        self._on_cuda = torch.cuda.is_available()
        self._base = 0 if self._on_cuda else _status_bytes("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks, where the system lets a process do so."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # the figure is then the peak since the process began

    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() if self._on_cuda else _status_bytes("VmHWM") - self._base


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _addmm_flop(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return mm_flop(a_shape, b_shape)


def _sdpa_flop(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _sdpa_backward_flop(grad_out_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out_shape, query_shape, key_shape, value_shape)


def flop_counter() -> FlopCounterMode:
    """torch's counter, which lacks the in-place product and the attention kernels of CPU."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: _addmm_flop,
            aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flop,
        },
    )


def count_flops(work) -> int:
    """FLOPs of calling ``work()``, backward passes included."""
    with flop_counter() as counter:
        work()
    return counter.get_total_flops()


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Meter:
    """Measures a stretch of work that begins in one call and ends in another."""

    def __init__(self):
        self._memory = PeakMemory()
        self._counter: FlopCounterMode | None = None
        self._started = 0.0

    def start(self, counts_flops: bool = False) -> None:
        """Begin; counting FLOPs slows the work down, so a counted stretch is not a timed one."""
        self._memory.reset()
        if counts_flops:
            self._counter = flop_counter()
            self._counter.__enter__()
        synchronize()
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds, peak bytes, and FLOPs where they were counted."""
        synchronize()
        result = {"seconds": time.perf_counter() - self._started, "peak_bytes": self._memory.peak()}
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            result["flops"] = self._counter.get_total_flops()
            self._counter = None
        return result


def machine() -> dict:
    """Hardware and versions, for a result file."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": found,
    }


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else platform.processor()


def commit() -> str:
    """The commit that this is, with a plus where files have changed since; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_head() -> None:
    """What a printed result begins with: the command, commit, date and machine."""
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores"
    print(f"{command_line()}\ncommit {commit()}, {date.today()}; {where}; {versions}", flush=True)


def command_line() -> str:
    """The command of this process, as typed from the repository root."""
    return " ".join(["python", os.path.join("benchmarks", os.path.basename(sys.argv[0])), *sys.argv[1:]])


def write_json(path: str | Path, result: dict) -> None:
    """Write a result with the command, commit, date, machine and the load that it was measured under."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command_line(), "commit": commit(), "date": str(date.today()), "machine": machine()}
    Path(path).write_text(json.dumps({**head, "load_at_end": os.getloadavg(), **result}, indent=1) + "\n")


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell, the first one flush left."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for first, *others in [headings, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip(), flush=True)


def print_ratio(
    what: str,
    ratio: float,
    spread: tuple[float, float] | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """One line for a ratio; with a target, ``least`` or ``most``, it ends in a verdict."""
    line = f"  {what:<58} {ratio:6.3f}"
    line += f"  ({spread[0]:.3f}-{spread[1]:.3f})" if spread else " " * 15
    if least is not None:
        line += f"  target >= {least:<4}  {'ok' if ratio >= least else 'MISSED'}"
    if most is not None:
        line += f"  target <= {most:<4}  {'ok' if ratio <= most else 'MISSED'}"
    print(line.rstrip(), flush=True)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
