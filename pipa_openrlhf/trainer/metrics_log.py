"""Where the metrics of every optimizer step are written."""

import json
import os


class MetricsLog:
    """``metrics.jsonl`` in the output folder, and TensorBoard or wandb where asked for. Rank 0 only.

    Args:
        args: nested flags.
        last_step: steps after it are cut from an existing file, so that a resumed run has every step once.
    """

    def __init__(self, args, last_step: int):
        self.path = os.path.join(args.ckpt.output_dir, "metrics.jsonl")
        self._every = args.logger.logging_steps
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] <= last_step]
        self.last: dict = json.loads(kept[-1]) if kept else {}
        self._file = open(self.path + ".new", "w")
        self._file.writelines(kept)
        self._file.flush()
        os.replace(self.path + ".new", self.path)
        self._wandb = _start_wandb(args) if args.logger.wandb.key else None
        self._tensorboard = None
        if args.logger.tensorboard_dir and self._wandb is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                log_dir=os.path.join(args.logger.tensorboard_dir, args.logger.wandb.run_name)
            )

    def write(self, row: dict) -> None:
        """Append one optimizer step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        # An evaluation is logged whenever there was one.
        is_due = row["step"] % self._every == 0
        numbers = {
            name: value for name, value in row.items() if value is not None and (is_due or name.startswith("eval/"))
        }
        if not numbers:
            return
        names = {name: name if name.startswith("eval/") else f"train/{name}" for name in numbers}
        if self._wandb is not None:
            logged = {names[name]: value for name, value in numbers.items()}
            self._wandb.log({**logged, "train/global_step": row["step"], "eval/global_step": row["step"]})
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(names[name], value, row["step"])

    def close(self) -> None:
        """Flush and close every sink."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _complete_lines(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [line for line in file if line.endswith("\n")]


def _start_wandb(args):
    import wandb

    if not wandb.api.api_key:
        wandb.login(key=args.logger.wandb.key)
    wandb.init(
        entity=args.logger.wandb.org,
        project=args.logger.wandb.project,
        group=args.logger.wandb.group,
        name=args.logger.wandb.run_name,
        config={name: value for name, value in args.flat.items() if name != "logger.wandb.key"},
        reinit=True,
    )
    for prefix in ("train", "eval"):
        wandb.define_metric(f"{prefix}/global_step")
        wandb.define_metric(f"{prefix}/*", step_metric=f"{prefix}/global_step", step_sync=True)
    return wandb
