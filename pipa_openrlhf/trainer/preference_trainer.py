"""The one trainer: any objective, on DeepSpeed, with checkpoints, evaluation and metrics."""

import math
import os
import signal
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.plan import global_batches, rank_micro_batches
from pipa_openrlhf.data.prior_cache import PriorCache
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.losses.reduction import BatchCounts, count_batch, sft_term_weights, token_weights
from pipa_openrlhf.models.policy import PolicyActor
from pipa_openrlhf.trainer.checkpoint import load_checkpoint, save_checkpoint
from pipa_openrlhf.trainer.metrics import SUMS, batch_sums, means
from pipa_openrlhf.trainer.metrics_log import MetricsLog


@dataclass
class Position:
    """Where a run stands, as a checkpoint keeps it."""

    step: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class LossSettings:
    """How token losses become the loss of a global batch."""

    reduction: str = "sum"
    sft_coef: float = 0.0
    fixed_value: float | None = None


@dataclass
class PreferenceTrainer:
    """Trains a policy on samples.

    Attributes:
        args: nested flags.
        actor: its ``model`` is a DeepSpeed engine.
        cache: log-probs of the prior for every sample; None where the objective has no prior.
        export: writes the model to a folder; a collective call.
    """

    args: SimpleNamespace
    objective: Objective
    loss: LossSettings
    actor: PolicyActor
    strategy: Strategy
    train_samples: list[Sample]
    eval_samples: list[Sample]
    cache: PriorCache | None
    pad_token_id: int
    checkpoint_folder: str
    export: Callable[[str], None]
    position: Position = field(default_factory=Position)

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(len(self.train_samples) / self.args.train.batch_size)
        self.total_steps = self.steps_per_epoch * self.args.train.max_epochs
        self.micro_batch_size = usable_micro_batch_size(self.args, self.strategy.world_size)
        self._interrupted = False

    def resume(self, checkpoint: str) -> None:
        """Restore ``checkpoint``; training goes on after its last step."""
        # DeepSpeed creates its optimizer state at the first update. A zero loss makes one without touching a weight
        # that is not overwritten right after.
        batch = self._collate(np.array([0])).to(device())
        log_f, u = self.actor(batch)
        self.strategy.backward((log_f.sum() + u.sum()) * 0.0, self.actor, is_last=True)
        self.actor.model.step()
        saved = load_checkpoint(checkpoint, self.actor.model, self.strategy, self.strategy.print)
        if saved["train_samples"] != len(self.train_samples) or saved["batch_size"] != self.args.train.batch_size:
            raise UserError(
                f"{checkpoint} belongs to {saved['train_samples']} samples in batches of {saved['batch_size']}, this "
                f"run has {len(self.train_samples)} in batches of {self.args.train.batch_size}: use the same data "
                "and --train.batch_size, or another --ckpt.output_dir"
            )
        self.position = Position(saved["step"], saved["num_tokens"])
        self.strategy.print(f"Resumed from {checkpoint} after step {self.position.step} of {self.total_steps}")

    def fit(self) -> dict[str, float | None]:
        """Train to the end of the last epoch and return the last step's metrics.

        Raises:
            KeyboardInterrupt: on SIGINT or SIGTERM, after the running step was finished and checkpointed.
            UserError: the loss became NaN or infinite.
        """
        log = MetricsLog(self.args, self.position.step) if self.strategy.is_rank_0() else None
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        row: dict[str, float | None] = {}
        bar = tqdm(
            total=self.total_steps,
            initial=self.position.step,
            desc="Train step",
            disable=not self.strategy.is_rank_0(),
        )
        try:
            for epoch in range(self.position.step // self.steps_per_epoch, self.args.train.max_epochs):
                batches = global_batches(
                    len(self.train_samples), self.args.train.batch_size, self.args.train.seed, epoch
                )
                for batch, micro_batches in self._load_epoch(batches[self.position.step % self.steps_per_epoch :]):
                    row = self._train_step(batch, micro_batches)
                    if self._is_due(self.args.eval.steps, every_epoch=True) and self.eval_samples:
                        row.update({f"eval/{name}": value for name, value in self.evaluate().items()})
                    if log is not None:
                        log.write(row)
                    bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                    bar.update()
                    self._save_if_due()
        finally:
            bar.close()
            if log is not None:
                log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return row

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | None]:
        """Loss and metrics over the whole evaluation set, taken as one global batch."""
        everything = np.arange(len(self.eval_samples))
        counts = _counts(self.eval_samples, everything)
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        self.actor.model.eval()
        shares = rank_micro_batches(
            everything, self.strategy.get_rank(), self.strategy.world_size, self.micro_batch_size
        )
        for indices in tqdm(shares, desc="Evaluation", disable=not self.strategy.is_rank_0(), leave=False):
            batch = self._collate(indices, self.eval_samples).to(device())
            log_f, u = self._forward(batch)
            if len(indices):
                totals += batch_sums(self.objective, log_f, u, batch, self._loss(log_f, u, batch, counts))
        self.actor.model.train()
        return means(self.objective, self.strategy.all_reduce(totals))

    def _train_step(self, batch_indices: np.ndarray, micro_batches: list[tuple[np.ndarray, Batch]]) -> dict:
        started = time.monotonic()
        engine = self.actor.model
        engine.train()
        lr = engine.lr_scheduler.get_last_lr()[0]
        counts = _counts(self.train_samples, batch_indices)
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        for number, (indices, batch) in enumerate(micro_batches, start=1):
            batch = batch.to(device())
            log_f, u = self._forward(batch)
            loss = self._loss(log_f, u, batch, counts)
            if len(indices):
                totals += batch_sums(self.objective, log_f, u, batch, loss.detach())
            else:
                loss = loss * 0.0
            self.strategy.backward(loss, self.actor, is_last=number == len(micro_batches))
        grad_norm = self._step_engine()
        totals[SUMS.index("interrupted")] = float(self._interrupted)
        totals = self.strategy.all_reduce(totals)
        self._interrupted = bool(totals[SUMS.index("interrupted")])
        num_tokens = sum(len(self.train_samples[index].input_ids) for index in batch_indices)
        self.position = Position(self.position.step + 1, self.position.num_tokens + num_tokens)
        metrics = means(self.objective, totals)
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"the loss of step {self.position.step} is {metrics['loss']}: lower the learning rate, "
                "or go back to a checkpoint with --ckpt.load_enable"
            )
        return {
            "step": self.position.step,
            "epoch": self.position.step / self.steps_per_epoch,
            **{name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()},
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": self.position.num_tokens,
            "tokens_per_second": num_tokens / (time.monotonic() - started),
        }

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        log_f, u = self.actor(batch)
        if self.loss.fixed_value is not None:
            u = torch.full_like(u, math.log(self.loss.fixed_value) - math.log1p(-self.loss.fixed_value))
        return log_f, u

    def _loss(self, log_f: torch.Tensor, u: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """This micro-batch's share of the global batch's loss."""
        token_loss = self.objective.token_loss(log_f, batch.log_p, u, batch.labels)
        loss = (token_loss * token_weights(batch.mask, self.loss.reduction, counts)).sum()
        if self.loss.sft_coef:
            loss = loss - self.loss.sft_coef * (log_f * sft_term_weights(batch.labels, batch.mask, counts)).sum()
        return loss

    def _step_engine(self) -> float:
        """Clip, update, and return the gradient norm before clipping."""
        engine = self.actor.model
        norm = None
        if engine.zero_optimization_stage() == 0:
            # DeepSpeed reports no norm for a plain float32 optimizer.
            gradients = [one.grad for one in engine.module.parameters() if one.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        engine.step()
        reported = engine.get_global_grad_norm()
        return float(reported if reported is not None else norm)

    def _load_epoch(self, batches: list[np.ndarray]):
        plan = [
            rank_micro_batches(batch, self.strategy.get_rank(), self.strategy.world_size, self.micro_batch_size)
            for batch in batches
        ]
        workers = self.args.data.dataloader_num_workers
        loader = DataLoader(_Steps(plan, self._collate), batch_size=None, num_workers=workers)
        return zip(batches, loader)

    def _collate(self, indices: np.ndarray, samples: list[Sample] | None = None) -> Batch:
        # An idle rank still runs a forward pass, on the first sample; its loss is multiplied by zero.
        samples = self.train_samples if samples is None else samples
        chosen = [samples[index] for index in (indices if len(indices) else [0])]
        log_p = None if self.cache is None else [self.cache.log_probs(sample) for sample in chosen]
        return collate(chosen, log_p, self.pad_token_id, self.args.ds.packing_samples)

    def _is_due(self, every: int, every_epoch: bool) -> bool:
        if every == -1:
            return every_epoch and self.position.step % self.steps_per_epoch == 0
        return self.position.step % every == 0

    def _save_if_due(self) -> None:
        step = self.position.step
        due = self._is_due(self.args.ckpt.save_steps, every_epoch=False)
        if (due and not self.args.ckpt.disable_ds) or self._interrupted:
            saved = {
                "step": step,
                "num_tokens": self.position.num_tokens,
                "train_samples": len(self.train_samples),
                "batch_size": self.args.train.batch_size,
            }
            ckpt = self.args.ckpt
            save_checkpoint(
                self.checkpoint_folder, step, self.actor.model, self.strategy, saved, ckpt.max_num, ckpt.max_mem
            )
        if due and self.args.ckpt.save_hf:
            self.export(os.path.join(self.checkpoint_folder, f"global_step{step}_hf"))
        if self._interrupted:
            self.strategy.print(f"Stopped after step {step}; go on with --ckpt.load_enable")
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True


class _Steps(Dataset):
    """One item an optimizer step: this rank's micro-batches as (sample indices, tensors)."""

    def __init__(self, plan: list[list[np.ndarray]], collate_indices: Callable[[np.ndarray], Batch]):
        self.plan = plan
        self.collate_indices = collate_indices

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> list[tuple[np.ndarray, Batch]]:
        return [(indices, self.collate_indices(indices)) for indices in self.plan[step]]


def usable_micro_batch_size(args: SimpleNamespace, world_size: int) -> int:
    """``--train.micro_batch_size``, lowered to a rank's share of the global batch."""
    return min(args.train.micro_batch_size, math.ceil(args.train.batch_size / world_size))


def _counts(samples: list[Sample], indices: np.ndarray) -> BatchCounts:
    return count_batch([(samples[index].labels, samples[index].mask) for index in indices])
