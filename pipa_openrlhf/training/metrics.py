"""Training metrics as sums over micro-batches and ranks, turned into means once an optimizer step."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.batch import Batch
from pipa_openrlhf.objectives.batch_loss import BatchCounts, token_weights
from pipa_openrlhf.objectives.objective import Objective, TokenLoss
from pipa_openrlhf.settings import flatten

SUMS = (
    "loss",
    "chosen_sequences",
    "chosen_logratio",
    "rejected_sequences",
    "rejected_logratio",
    "chosen_logp",
    "rejected_logp",
    "pairs",
    "pairs_in_order",
    "value_likelihood",
    "right_tokens",
    "right_F",
    "wrong_tokens",
    "wrong_F",
    "clipped_tokens",
    "right_pull",
    "wrong_pull",
    "squared_pull",
    "stop",
)


@torch.no_grad()
def batch_sums(
    objective: Objective,
    log_f: torch.Tensor,
    u: torch.Tensor,
    batch: Batch,
    loss: torch.Tensor,
    counts: BatchCounts,
) -> torch.Tensor:
    """What one micro-batch adds to every entry of ``SUMS``.

    Args:
        log_f, u: [B, T] float32.
        loss: this micro-batch's share of the global loss.
        counts: of the global batch.

    Returns:
        [len(SUMS)] float64 on the batch's device.
    """
    mask = batch.mask.double()
    zero = mask.new_zeros(())
    sums = dict.fromkeys(SUMS, zero)
    sums["loss"] = loss.double()
    chosen = batch.answer_label.double()
    sums["chosen_sequences"], sums["rejected_sequences"] = chosen.sum(), (1 - chosen).sum()
    logp = (log_f.double() * mask).sum(dim=1)
    right, wrong = mask * batch.labels, mask * (1 - batch.labels)
    sums["right_tokens"], sums["wrong_tokens"] = right.sum(), wrong.sum()
    sums["chosen_logp"], sums["rejected_logp"] = (logp * chosen).sum(), (logp * (1 - chosen)).sum()
    if objective.needs_prior:
        logratio = ((log_f - batch.log_p).double() * mask).sum(dim=1)
        sums["chosen_logratio"], sums["rejected_logratio"] = (logratio * chosen).sum(), (logratio * (1 - chosen)).sum()
        if objective.needs_pairs:
            sums["pairs"] = zero + len(logratio) // 2
            sums["pairs_in_order"] = (logratio[0::2] > logratio[1::2]).double().sum()
    if objective.log_F is not None:
        label_log_prob = functional.logsigmoid(torch.where(batch.labels != 0, u, -u)).double()
        sums["value_likelihood"] = ((label_log_prob * mask).sum(dim=1) / mask.sum(dim=1)).exp().sum()
        log_F = objective.log_F(log_f, batch.log_p, u)
        likelihood = log_F.double().exp()
        if objective.is_clipped is not None:
            sums["clipped_tokens"] = (objective.is_clipped(log_F) * wrong).sum()
        sums["right_F"] = _masked_sum(likelihood, right)
        # The F of a wrong token is the one its loss sees, which never exceeds 1.
        sums["wrong_F"] = _masked_sum(likelihood.clamp(max=1), wrong)
        if objective.token_loss is not None:
            weights = token_weights(batch.mask, objective.reduction, counts) * batch.weight[:, None]
            pull = _pull(objective.token_loss, log_f, u, batch) * weights.double()
            sums["right_pull"], sums["wrong_pull"] = _masked_sum(pull, right), _masked_sum(pull, wrong)
            sums["squared_pull"] = _masked_sum(pull.square(), mask)
    return torch.stack([sums[name] for name in SUMS])


def means(objective: Objective, totals: torch.Tensor, z0: torch.Tensor) -> dict[str, float | None]:
    """Metrics of a global batch from the totals of ``SUMS`` over its micro-batches and ranks, and KTO's z0.

    A mean over nothing (no rejected answer in the batch, say) is None.
    """
    total = dict(zip(SUMS, totals.tolist()))

    def mean(numerator: str, denominator: str) -> float | None:
        return total[numerator] / total[denominator] if total[denominator] else None

    labelled_tokens = total["right_tokens"] + total["wrong_tokens"]
    result: dict[str, float | None] = {
        "loss": total["loss"],
        "right_token_share": total["right_tokens"] / labelled_tokens if labelled_tokens else None,
    }
    if objective.needs_prior:
        chosen = mean("chosen_logratio", "chosen_sequences")
        rejected = mean("rejected_logratio", "rejected_sequences")
        scale = objective.reward_scale
        result["rewards/chosen"] = None if chosen is None else scale * chosen
        result["rewards/rejected"] = None if rejected is None else scale * rejected
        result["rewards/margins"] = None if chosen is None or rejected is None else scale * (chosen - rejected)
        result.update({"logratio/chosen": chosen, "logratio/rejected": rejected})
        if objective.needs_pairs:
            result["rewards/accuracies"] = mean("pairs_in_order", "pairs")
    result["logps/chosen"] = mean("chosen_logp", "chosen_sequences")
    result["logps/rejected"] = mean("rejected_logp", "rejected_sequences")
    if objective.needs_mismatched:
        result["kl"] = float(z0)
    if objective.log_F is not None:
        sequences = total["chosen_sequences"] + total["rejected_sequences"]
        result["pipa/value_likelihood"] = total["value_likelihood"] / sequences
        result["pipa/F_chosen"] = mean("right_F", "right_tokens")
        result["pipa/F_rejected"] = mean("wrong_F", "wrong_tokens")
        result["pipa/clip_fraction"] = mean("clipped_tokens", "wrong_tokens")
        if objective.token_loss is not None:
            pull = total["right_pull"] + total["wrong_pull"]
            result["pipa/gradient_rejected"] = total["wrong_pull"] / pull if pull else None
            # Without a weight of 0 for some, N equal pulls give 1 and a single one 1 / N.
            spread = total["squared_pull"] * labelled_tokens
            result["pipa/gradient_spread"] = pull**2 / spread if spread else None
    return result


@torch.enable_grad()
def _pull(token_loss: TokenLoss, log_f: torch.Tensor, u: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, T] float64 size of the derivative of each token's loss with respect to its log f."""
    at = log_f.detach().requires_grad_()
    loss = token_loss(at, batch.log_p, u.detach(), batch.labels)
    if not loss.requires_grad:  # of u alone
        return torch.zeros_like(at, dtype=torch.float64)
    (derivative,) = torch.autograd.grad(loss.sum(), at)
    return derivative.double().abs()


def _masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # where() rather than a product: F may be infinite at tokens outside the mask, and inf * 0 is NaN.
    return torch.where(mask != 0, values, torch.zeros_like(values)).sum()


class MetricsLog:
    """``metrics.jsonl`` in the output folder, and TensorBoard or wandb where asked for. Rank 0 only.

    Args:
        last_step: steps after it are cut from an existing file, so that a resumed run has every step once.
    """

    def __init__(self, config: RunConfig, last_step: int):
        self.path = os.path.join(config.ckpt.output_dir, "metrics.jsonl")
        self._every = config.logger.logging_steps
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] <= last_step]
        self.last: dict = json.loads(kept[-1]) if kept else {}
        self._file = open(self.path + ".new", "w")
        self._file.writelines(kept)
        self._file.flush()
        os.replace(self.path + ".new", self.path)
        self._wandb = _start_wandb(config) if config.logger.wandb.key else None
        self._tensorboard = None
        if config.logger.tensorboard_dir and self._wandb is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                log_dir=os.path.join(config.logger.tensorboard_dir, config.logger.wandb.run_name)
            )

    def write(self, row: dict) -> None:
        """Append one optimizer step."""
        with _naming(self.path):
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
        with _naming(self.path):
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say which file it is: where a disk is full the system does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _complete_lines(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [line for line in file if line.endswith("\n")]


def _start_wandb(config: RunConfig):
    import wandb

    if not wandb.api.api_key:
        wandb.login(key=config.logger.wandb.key)
    wandb.init(
        entity=config.logger.wandb.org,
        project=config.logger.wandb.project,
        group=config.logger.wandb.group,
        name=config.logger.wandb.run_name,
        config={name: value for name, value in flatten(config).items() if name != "logger.wandb.key"},
        reinit=True,
    )
    for prefix in ("train", "eval"):
        wandb.define_metric(f"{prefix}/global_step")
        wandb.define_metric(f"{prefix}/*", step_metric=f"{prefix}/global_step", step_sync=True)
    return wandb
