"""Train with PIPA-M or PIPA-N: ``deepspeed --module pipa_openrlhf.cli.train_pipa ...``"""

import sys
from types import SimpleNamespace

from pipa_openrlhf.cli.checks import check_training
from pipa_openrlhf.cli.entry import run


def main(args: SimpleNamespace) -> None:
    """Train on labelled answers, paired or not, labelled as a whole or step by step."""
    check_training(args)
    from pipa_openrlhf.losses.objectives import PIPA_N, pipa_m
    from pipa_openrlhf.trainer.preference_trainer import LossSettings
    from pipa_openrlhf.trainer.run import train

    objective = pipa_m(args.pipa.clip_eps) if args.pipa.variant == "m" else PIPA_N
    train(args, objective, LossSettings(args.pipa.loss_reduction, args.pipa.sft_coef, args.pipa.fixed_value))


def cli() -> int:
    """Console entry point."""
    return run(main, "train_pipa")


if __name__ == "__main__":
    sys.exit(cli())
