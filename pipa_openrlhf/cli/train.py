"""Train with any family of objectives in the table: ``python -m pipa_openrlhf.cli.train --objective NAME ...``

``train_pipa``, ``train_dpo``, ``train_kto`` and ``train_sft`` are this with their own family.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.errors import Stopped

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import Callback


def main(config: RunConfig, callbacks: "Sequence[Callback]" = ()) -> None:
    """Check the flags before anything heavy is imported, then train; a SIGTERM ends it in good order."""
    config.check()
    from pipa_openrlhf.training.run import StopOnSignals, train

    signals = StopOnSignals()
    try:
        train(config, [signals, *callbacks])
    except Stopped:
        if signals.was_interrupted:
            raise


def cli() -> int:
    """Console entry point."""
    return run(main, "train")


if __name__ == "__main__":
    sys.exit(cli())
