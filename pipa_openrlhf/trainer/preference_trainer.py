"""The one trainer: any objective, on DeepSpeed, with checkpoints, evaluation and metrics."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipa_openrlhf.data.batch import Batch, collate
from pipa_openrlhf.data.plan import global_batches, rank_micro_batches
from pipa_openrlhf.data.prior_cache import PriorCache
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.data.training_set import TrainingSet
from pipa_openrlhf.distributed.devices import device
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.reduction import BatchCounts, count_batch
from pipa_openrlhf.models.policy import PolicyActor
from pipa_openrlhf.trainer.batch_loss import BatchLoss, answers_of
from pipa_openrlhf.trainer.checkpoint import load_checkpoint, save_checkpoint
from pipa_openrlhf.trainer.metrics import SUMS, batch_sums, means
from pipa_openrlhf.trainer.metrics_log import MetricsLog


@dataclass
class Position:
    """Where a run stands, as a checkpoint keeps it."""

    step: int = 0
    num_tokens: int = 0


@dataclass
class PreferenceTrainer:
    """Trains a policy on answers or pairs.

    Attributes:
        args: nested flags.
        actor: its ``model`` is a DeepSpeed engine.
        cache: log-probs of the prior for every sample; None where the objective has no prior.
        export: writes the model to a folder; a collective call.
    """

    args: SimpleNamespace
    loss: BatchLoss
    actor: PolicyActor
    strategy: Strategy
    train_set: TrainingSet
    eval_set: TrainingSet | None
    cache: PriorCache | None
    pad_token_id: int
    checkpoint_folder: str
    export: Callable[[str], None]
    position: Position = field(default_factory=Position)

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(self.train_set.num_units / self.args.train.batch_size)
        self.total_steps = self.steps_per_epoch * self.args.train.max_epochs
        self.micro_batch_size = self._usable_micro_batch_size()
        self.objective = self.loss.objective
        # float16 gradients need DeepSpeed's loss scale, which is known in the backward pass only.
        self.uses_single_pass_head = (
            self.args.train.fused_head and self.objective.token_loss is not None and self.args.ds.param_dtype != "fp16"
        )
        self.shares_prompts = self.args.train.share_prompts and self.actor.can_share_prompts
        if self.args.train.share_prompts and not self.shares_prompts:
            self.strategy.print(
                "--train.share_prompts: this model's attention cannot, or experts are balanced; not used"
            )
        self.grouping = self.train_set.grouping(self.shares_prompts) if self.args.train.group_by_length else None
        self._interrupted = self._ctrl_c = False
        # What a run that resumes a checkpoint must share with the one that wrote it.
        self.identity = {
            "--train.batch_size": self.args.train.batch_size,
            "--train.seed": self.args.train.seed,
            "--train.group_by_length": self.args.train.group_by_length,
            # Batches depend on it only where they are grouped.
            "--train.share_prompts": self.shares_prompts and self.args.train.group_by_length,
            "--ds.lora.alpha": self.args.ds.lora.alpha,
            "objective": self.objective.name,
            "data": self.train_set.fingerprint(),
        }

    def resume(self, checkpoint: str) -> None:
        """Restore ``checkpoint``; training goes on after its last step."""
        # DeepSpeed creates its optimizer state at the first update. A zero loss makes one without touching a weight
        # that is not overwritten right after.
        batch = self._micro_batch(np.array([0]), self.train_set).batch.to(device())
        output = self.actor(batch)
        nothing = (output.log_f.sum() + output.u.sum() + output.aux_loss) * 0.0
        self.strategy.backward(nothing, self.actor, is_last=True)
        self.actor.model.step()
        saved = load_checkpoint(checkpoint, self.actor.model, self.strategy, self.identity, self.strategy.print)
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
        row: dict[str, float | None] = log.last if log is not None else {}
        bar = tqdm(
            total=self.total_steps,
            initial=self.position.step,
            desc="Train step",
            disable=not self.strategy.is_rank_0(),
        )
        try:
            for epoch in range(self.position.step // self.steps_per_epoch, self.args.train.max_epochs):
                batches = global_batches(
                    self.train_set.num_units, self.args.train.batch_size, self.args.train.seed, epoch, self.grouping
                )
                for batch, micro_batches in self._load_epoch(batches[self.position.step % self.steps_per_epoch :]):
                    row = self._train_step(batch, micro_batches)
                    if self._is_due(self.args.eval.steps, every_epoch=True) and self.eval_set is not None:
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
        everything = np.arange(self.eval_set.num_units)
        counts = _counts(self.eval_set, everything)
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        self.actor.model.eval()
        shares = rank_micro_batches(
            everything,
            self.strategy.get_rank(),
            self.strategy.world_size,
            self.micro_batch_size,
            self.eval_set.grouping(self.shares_prompts),
        )
        z0 = self._reference_point([self._micro_batch(units, self.eval_set) for units in shares])
        for units in tqdm(shares, desc="Evaluation", disable=not self.strategy.is_rank_0(), leave=False):
            micro_batch = self._micro_batch(units, self.eval_set)
            batch = micro_batch.batch.to(device())
            output = self.actor(batch)
            if not micro_batch.is_idle:
                loss = self.loss.share(output, batch, counts, z0)
                totals += batch_sums(self.objective, output.log_f, output.u, batch, loss)
        self.actor.model.train()
        return means(self.objective, self.strategy.all_reduce(totals), z0)

    def _train_step(self, units: np.ndarray, micro_batches: list["MicroBatch"]) -> dict:
        started = time.monotonic()
        engine = self.actor.model
        engine.train()
        lr = engine.lr_scheduler.get_last_lr()[0]
        counts = _counts(self.train_set, units)
        z0 = self._reference_point(micro_batches)
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        for number, micro_batch in enumerate(micro_batches, start=1):
            batch = micro_batch.batch.to(device())
            terms = self.loss.token_terms(batch, counts) if self.uses_single_pass_head else None
            output = self.actor(batch, terms)
            loss = self.loss.share(output, batch, counts, z0)
            if micro_batch.is_idle:
                loss = loss * 0.0
            else:
                totals += batch_sums(self.objective, output.log_f.detach(), output.u, batch, loss.detach())
            self.strategy.backward(loss, self.actor, is_last=number == len(micro_batches))
        grad_norm = self._step_engine()
        totals[SUMS.index("interrupted")] = float(self._interrupted)
        totals = self.strategy.all_reduce(totals)
        self._interrupted = bool(totals[SUMS.index("interrupted")])
        num_tokens = sum(len(self.train_set.samples[row].input_ids) for row in self.train_set.rows(units))
        self.position = Position(self.position.step + 1, self.position.num_tokens + num_tokens)
        metrics = means(self.objective, totals, z0)
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

    @torch.no_grad()
    def _reference_point(self, micro_batches: list["MicroBatch"]) -> torch.Tensor:
        """KTO's z0: mean log-ratio of the global batch's mismatched completions, at least 0; no gradient."""
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        if not self.objective.needs_mismatched:
            return totals[0].float()
        for micro_batch in micro_batches:
            if micro_batch.mismatched is not None:
                batch = micro_batch.mismatched.to(device())
                log_f = self.actor(batch, with_value=False).log_f
                if micro_batch.num_mismatched:
                    log_ratio = answers_of(log_f, batch, totals[0]).log_ratio
                    totals[0] += log_ratio.double().sum()
                    totals[1] += micro_batch.num_mismatched
        total, count = self.strategy.all_reduce(totals)
        return (total / count.clamp(min=1)).clamp(min=0).float()

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
        rank, world_size = self.strategy.get_rank(), self.strategy.world_size
        plan = [rank_micro_batches(batch, rank, world_size, self.micro_batch_size, self.grouping) for batch in batches]
        workers = self.args.data.dataloader_num_workers
        steps = _Steps(plan, partial(self._micro_batch, data=self.train_set))
        # With a generator of its own the loader leaves the one that dropout draws from alone, as resuming needs.
        loader = DataLoader(steps, batch_size=None, num_workers=workers, generator=torch.Generator())
        return zip(batches, loader)

    def _micro_batch(self, units: np.ndarray, data: TrainingSet) -> "MicroBatch":
        # An idle rank still runs a forward pass, on the first unit; its loss is multiplied by zero.
        rows = data.rows(units if len(units) else np.array([0]))
        mismatched, num_mismatched = None, 0
        if any(sample is not None for sample in data.mismatched):
            chosen = [data.mismatched[row] for row in rows if data.mismatched[row] is not None]
            num_mismatched = len(chosen) if len(units) else 0
            mismatched = self._collate(chosen or [next(filter(None, data.mismatched))])
        return MicroBatch(
            len(units) == 0, self._collate([data.samples[row] for row in rows]), mismatched, num_mismatched
        )

    def _collate(self, samples: list[Sample]) -> Batch:
        log_p = None if self.cache is None else [self.cache.log_probs(sample) for sample in samples]
        return collate(
            samples,
            log_p,
            self.pad_token_id,
            self.args.ds.packing_samples,
            share_prompts=self.shares_prompts,
            keep_last_token=self.loss.settings.aux_coef > 0,
        )

    def _usable_micro_batch_size(self) -> int:
        asked, batch_size = self.args.train.micro_batch_size, self.args.train.batch_size
        share = math.ceil(batch_size / self.strategy.world_size)
        if asked > share:
            self.strategy.print(
                f"--train.micro_batch_size {asked} is more than a rank's share of --train.batch_size {batch_size}: "
                f"using {share}"
            )
        return min(asked, share)

    def _is_due(self, every: int, every_epoch: bool) -> bool:
        if every == -1:
            return every_epoch and self.position.step % self.steps_per_epoch == 0
        return self.position.step % every == 0

    def _save_if_due(self) -> None:
        step = self.position.step
        due = self._is_due(self.args.ckpt.save_steps, every_epoch=False)
        if (due and not self.args.ckpt.disable_ds) or self._interrupted:
            save_checkpoint(
                self.checkpoint_folder,
                step,
                self.actor.model,
                self.strategy,
                position=asdict(self.position),
                identity=self.identity,
                max_num=self.args.ckpt.max_num,
                max_gb=self.args.ckpt.max_mem,
            )
        if due and self.args.ckpt.save_hf:
            self.export(os.path.join(self.checkpoint_folder, f"global_step{step}_hf"))
        if self._interrupted:
            self.strategy.print(f"Stopped after step {step}; go on with --ckpt.load_enable")
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame) -> None:
        # On ctrl-C a launcher sends SIGTERM on top of the terminal's SIGINT; only a second ctrl-C means "at once".
        if number == signal.SIGINT and self._ctrl_c:
            raise KeyboardInterrupt
        self._ctrl_c = number == signal.SIGINT
        self._interrupted = True


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs in one forward and backward pass.

    Attributes:
        is_idle: there was nothing left for this rank; the batch is a stand-in.
        mismatched: KTO's mismatched completions of the same answers, or a stand-in where none of them has one.
        num_mismatched: how many of them count.
    """

    is_idle: bool
    batch: Batch
    mismatched: Batch | None
    num_mismatched: int


class _Steps(Dataset):
    """One item an optimizer step: this rank's micro-batches."""

    def __init__(self, plan: list[list[np.ndarray]], make: Callable[[np.ndarray], MicroBatch]):
        self.plan = plan
        self.make = make

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        return [self.make(units) for units in self.plan[step]]


def _counts(data: TrainingSet, units: np.ndarray) -> BatchCounts:
    samples = [data.samples[row] for row in data.rows(units)]
    return count_batch([(one.labels, one.mask, one.answer_label) for one in samples], data.unit_size)
