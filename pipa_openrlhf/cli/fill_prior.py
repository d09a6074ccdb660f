"""The prior's log-probs that training runs will need, into their cache, before any of them starts.

A sweep does this once for all its trials. The runs are described by files as ``--config`` of ``cli.train`` takes them.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import setting, updated

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FillSettings:
    """Of which runs."""

    configs: Sequence[str] = setting((), "YAML files of training runs, such as a run's config.yaml", nargs="+")
    report: str | None = setting(
        None,
        "JSONL that gets a row a run: the digest of what decides it, or what is wrong with it, which then does not "
        "stop the others; unset: it does",
    )
    started: str | None = setting(None, "ISO time at which chat templates believe to be; unset: now")


@dataclass(frozen=True)
class FillConfig:
    """Of this command."""

    fill: FillSettings = field(default_factory=FillSettings)
    local_rank: int = setting(-1, "set by the deepspeed launcher")


def main(config: FillConfig) -> None:
    if not config.fill.configs:
        raise UserError("--fill.configs is required: YAML files of training runs")
    runs = [(path, parse("train", ["--config", path])) for path in config.fill.configs]
    rows = []
    for number, row in enumerate(_rows(runs, config), start=1):
        log.info(f"{number} of {len(runs)}: {row['config']}: {row.get('error', 'its prior is scored')}")
        rows.append(row)
        if config.fill.report is not None and os.environ.get("RANK", "0") == "0":
            with open(config.fill.report, "w", encoding="utf-8") as file:
                file.write("".join(json.dumps(one) + "\n" for one in rows))


def _rows(runs: list[tuple[str, RunConfig]], config: FillConfig) -> Iterator[dict[str, str]]:
    from pipa_openrlhf.training.run import score_prior

    for path, run_config in runs:
        try:
            identity = score_prior(updated(run_config, {"local_rank": config.local_rank}), config.fill.started)
        except UserError as error:
            # Of several ranks the others may not have met it, and wait.
            if config.fill.report is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            yield {"config": path, "error": str(error)}
        else:
            yield {"config": path, "identity": identity.digest}


def cli() -> int:
    """Console entry point."""
    return run(main, "fill_prior")


if __name__ == "__main__":
    sys.exit(cli())
