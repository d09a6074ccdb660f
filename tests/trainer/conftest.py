"""Ten labelled answers of different lengths, and the flags of a small run on them."""

import pytest
from tiny import flags, write_jsonl

# Three batches of four an epoch, the last of them partial.
ROWS = [
    {
        "prompt": f"{n}+{n}?\n",
        "completions": ["x" * (n % 4 + 1), f"so {n + n + n % 3}"],
        "labels": [n % 4 > 0, n % 3 == 0],
    }
    for n in range(10)
]


@pytest.fixture
def small_run(tiny_models, tmp_path):
    """``small_run(output, **{"flag": value})`` -> the flags of a run: six steps, checkpoints after each."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)

    def make(output, **changes) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "prior.model_name_or_path": tiny_models / "prior",
                "prior.cache_dir": tmp_path / "cache",
                "data.dataset": data,
                "data.annotation": "step",
                "pipa.variant": "n",
                "ds.param_dtype": "fp32",
                "ds.zero_stage": 0,
                "train.batch_size": 4,
                "train.micro_batch_size": 2,
                "train.max_epochs": 2,
                "adam.lr": 0.01,
                "ckpt.save_steps": 1,
                "ckpt.max_num": 99,
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make
