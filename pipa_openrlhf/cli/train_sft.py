"""Supervised fine-tuning, and the priors of Table 3: ``deepspeed --module pipa_openrlhf.cli.train_sft ...``"""

import sys
from types import SimpleNamespace

from pipa_openrlhf.cli.checks import check_training
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.signals import stop_on_signals


def main(args: SimpleNamespace) -> None:
    """Train on the answers that ``--data.keep`` selects, by default the right ones."""
    check_training(args)
    from pipa_openrlhf.losses.objectives import objectives
    from pipa_openrlhf.trainer.batch_loss import LossSettings
    from pipa_openrlhf.trainer.run import train

    train(
        args,
        objectives()["sft"],
        LossSettings(reduction="token_mean", aux_coef=args.model.aux_loss_coef),
        stop_on_signals,
    )


def cli() -> int:
    """Console entry point."""
    return run(main, "train_sft")


if __name__ == "__main__":
    sys.exit(cli())
