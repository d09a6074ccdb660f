"""The one place that knows which accelerator runs the job. CUDA and CPU are both first-class."""

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
