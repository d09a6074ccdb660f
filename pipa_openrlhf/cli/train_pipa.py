"""Train with PIPA-M or PIPA-N: ``deepspeed --module pipa_openrlhf.cli.train_pipa ...``"""

import sys
from types import SimpleNamespace

from pipa_openrlhf.cli.checks import check_training
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.signals import stop_on_signals


def main(args: SimpleNamespace) -> None:
    """Train on labelled answers, paired or not, labelled as a whole or step by step."""
    check_training(args)
    from pipa_openrlhf.losses.objectives import ObjectiveSettings, objectives
    from pipa_openrlhf.losses.plugin import load_objective
    from pipa_openrlhf.trainer.batch_loss import LossSettings
    from pipa_openrlhf.trainer.run import train

    parameters = ObjectiveSettings(clip_eps=args.pipa.clip_eps, beta=args.model.beta)
    if args.pipa.objective_module:
        objective = load_objective(args.pipa.objective_module, parameters)
    else:
        objective = objectives(parameters)[f"pipa_{args.pipa.variant}"]
    settings = LossSettings(
        reduction=args.pipa.loss_reduction,
        sft_coef=args.pipa.sft_coef,
        aux_coef=args.model.aux_loss_coef,
        fixed_value=args.pipa.fixed_value,
    )
    train(args, objective, settings, stop_on_signals)


def cli() -> int:
    """Console entry point."""
    return run(main, "train_pipa")


if __name__ == "__main__":
    sys.exit(cli())
