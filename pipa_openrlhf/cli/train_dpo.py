"""Train with DPO, IPO or Step-DPO on pairs, a drop-in for OpenRLHF's; batches are counted in pairs.

``deepspeed --module pipa_openrlhf.cli.train_dpo ...``
"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.train import main


def cli() -> int:
    """Console entry point."""
    return run(main, "train_dpo")


if __name__ == "__main__":
    sys.exit(cli())
