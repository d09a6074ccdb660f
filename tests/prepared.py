"""Rows to prepare, and prepared data laid open."""

from dataclasses import fields
from pathlib import Path

import numpy as np

from pipa_openrlhf.data.samples import Sample

ROWS = [
    {
        "prompt": f"what is {n % 9}\n",
        "completions": ["the cat"] * (n % 3 + 1) + ["sat " * (n % 5)] * (n % 5 > 0),
        "labels": [1] * (n % 3 + 1) + [n % 2] * (n % 5 > 0),
    }
    for n in range(40)
]


def plain(sample: Sample) -> dict:
    values = {one.name: getattr(sample, one.name) for one in fields(sample)}
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def everything(loaded) -> tuple:
    return (
        [plain(one) for one in loaded.samples],
        loaded.dropped,
        loaded.num_records,
        loaded.label_sources,
        loaded.bad_rows,
    )


def stores(tmp_path, cache="cache") -> list[Path]:
    return sorted(path for path in (tmp_path / cache).glob("v*/*") if path.suffix != ".lock")
