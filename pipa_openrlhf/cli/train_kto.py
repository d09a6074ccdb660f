"""Train with KTO or Step-KTO on single answers; pairs are taken apart.

``deepspeed --module pipa_openrlhf.cli.train_kto ...``
"""

import sys

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.train import main


def cli() -> int:
    """Console entry point."""
    return run(main, "train_kto")


if __name__ == "__main__":
    sys.exit(cli())
