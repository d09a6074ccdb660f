"""Supervised fine-tuning on the answers that ``--data.keep`` selects, and the priors of Table 3.

``deepspeed --module pipa_openrlhf.cli.train_sft ...``
"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.train import main


def cli() -> int:
    """Console entry point."""
    return run(main, "train_sft")


if __name__ == "__main__":
    sys.exit(cli())
