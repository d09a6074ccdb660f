"""Train with KTO or Step-KTO on unpaired answers: ``deepspeed --module pipa_openrlhf.cli.train_kto ...``"""

import sys
from types import SimpleNamespace

from pipa_openrlhf.cli.checks import check_training
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.signals import stop_on_signals


def main(args: SimpleNamespace) -> None:
    """Train on single answers; pairs are taken apart."""
    check_training(args)
    from pipa_openrlhf.losses.objectives import ObjectiveSettings, objectives
    from pipa_openrlhf.trainer.batch_loss import LossSettings
    from pipa_openrlhf.trainer.run import train

    table = objectives(
        ObjectiveSettings(
            beta=args.model.beta,
            desirable_weight=args.kto.desirable_weight,
            undesirable_weight=args.kto.undesirable_weight,
        )
    )
    objective = table[f"step_kto_{args.kto.step_loss}" if args.data.annotation == "step" else "kto"]
    train(
        args, objective, LossSettings(sft_coef=args.kto.sft_coef, aux_coef=args.model.aux_loss_coef), stop_on_signals
    )


def cli() -> int:
    """Console entry point."""
    return run(main, "train_kto")


if __name__ == "__main__":
    sys.exit(cli())
