"""Train with DPO, IPO or Step-DPO, a drop-in for OpenRLHF's: ``deepspeed --module pipa_openrlhf.cli.train_dpo ...``"""

import sys
from types import SimpleNamespace

from pipa_openrlhf.cli.checks import check_training
from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.signals import stop_on_signals


def main(args: SimpleNamespace) -> None:
    """Train on pairs; batches and micro-batches are counted in pairs."""
    check_training(args)
    from pipa_openrlhf.losses.objectives import ObjectiveSettings, objectives
    from pipa_openrlhf.trainer.batch_loss import LossSettings
    from pipa_openrlhf.trainer.run import train

    table = objectives(ObjectiveSettings(beta=args.model.beta, label_smoothing=args.model.label_smoothing))
    if args.model.ipo_enable:
        objective = table["ipo"]
    elif args.data.annotation == "step":
        objective = table[f"step_dpo_{args.dpo.step_loss}"]
    else:
        objective = table["dpo"]
    train(
        args,
        objective,
        LossSettings(nll_coef=args.model.nll_loss_coef, aux_coef=args.model.aux_loss_coef),
        stop_on_signals,
    )


def cli() -> int:
    """Console entry point."""
    return run(main, "train_dpo")


if __name__ == "__main__":
    sys.exit(cli())
