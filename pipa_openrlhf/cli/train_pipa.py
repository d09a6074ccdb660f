"""Train with PIPA-M or PIPA-N on labelled answers, paired or not, labelled as a whole or step by step.

``deepspeed --module pipa_openrlhf.cli.train_pipa ...``
"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.train import main


def cli() -> int:
    """Console entry point."""
    return run(main, "train_pipa")


if __name__ == "__main__":
    sys.exit(cli())
