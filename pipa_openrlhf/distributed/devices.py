"""The one place that knows which accelerator runs the job."""

import time

import torch
from deepspeed.accelerator import get_accelerator

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device() -> torch.device:
    """Device of this process: ``cuda:<local rank>`` or ``cpu``."""
    return torch.device(get_accelerator().current_device_name())


def on_cpu() -> bool:
    """True where DeepSpeed found no accelerator."""
    return get_accelerator().device_name() == "cpu"


def dtype_of(name: str) -> torch.dtype:
    """``"bf16" | "fp16" | "fp32"`` to a torch dtype."""
    return _DTYPES[name]


def fastest_dtype() -> str:
    """``"bf16"``, or ``"fp32"`` on a CPU that multiplies matrices faster in it, as measured here and now.

    Without instructions for bf16 a CPU can be a hundred times slower in it than in float32.
    """
    if not on_cpu():
        return "bf16"
    return min(("bf16", "fp32"), key=lambda name: _seconds_a_product(dtype_of(name)))


def slow_dtype_hint(name: str) -> str | None:
    """A line for a user whose CPU is slower in the data type they chose; None otherwise."""
    if name == "bf16" and fastest_dtype() == "fp32":
        return "bf16 is slower than float32 on this CPU, often many times: --ds.param_dtype fp32 is faster here"
    return None


def _seconds_a_product(dtype: torch.dtype) -> float:
    left, right = torch.ones(64, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one sets the kernel up
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
