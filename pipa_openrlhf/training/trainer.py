"""The one trainer: any objective, on DeepSpeed, with checkpoints, evaluation and metrics."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.plan import global_batches
from pipa_openrlhf.data.training_set import Collator, MicroBatch, MicroBatches, StepBatches, TrainingSet, load_steps
from pipa_openrlhf.distributed.strategy import Strategy, device
from pipa_openrlhf.distributed.transfer import on_device
from pipa_openrlhf.errors import Stopped
from pipa_openrlhf.model.policy import PolicyActor
from pipa_openrlhf.objectives.batch_loss import BatchCounts, BatchLoss, answers_of, count_batch
from pipa_openrlhf.prior.cache import PriorCache
from pipa_openrlhf.training.bad_steps import bad_records, count_bad_step, spoil_if_bad
from pipa_openrlhf.training.checkpoint import load_checkpoint, save_checkpoint
from pipa_openrlhf.training.checks import StartCheck, UpdateCheck
from pipa_openrlhf.training.export import export_step
from pipa_openrlhf.training.metrics import SUMS, MetricsLog, batch_sums, means

log = logging.getLogger(__name__)


class Callback:
    """What may look into a run while it goes: benchmarks, notebooks, signals, tests that make something fail.

    Subclass it and override what is wanted; every method is called on every rank.
    """

    def on_prior_begin(self) -> None:
        """Before the prior scores answers that its cache lacks; from here on :meth:`wants_stop` is asked."""

    def on_prior_end(self) -> None:
        """After it, and after an error or an interrupt."""

    def on_train_begin(self, trainer: "PreferenceTrainer") -> None:
        """Before the first step: the model, the prior's log-probs and the data are ready."""

    def on_update_begin(self, trainer: "PreferenceTrainer") -> None:
        """In every step with a finite loss, before its update: the gradients are complete, the weights are still those
        of the step before. What is asked of :meth:`wants_stop` from here on is the next step's."""

    def on_step_end(self, trainer: "PreferenceTrainer", row: dict) -> None:
        """After an optimizer step, its evaluation and its checkpoint.

        Args:
            row: the step's metrics, as in ``metrics.jsonl``.
        """

    def on_export_begin(self, trainer: "PreferenceTrainer", folder: str) -> None:
        """Before the model is written, during training (``--ckpt.save_hf``) and after it.

        Args:
            folder: where to; it need not be there yet.
        """

    def on_train_end(self, trainer: "PreferenceTrainer") -> None:
        """After the last step, and after an error or an interrupt."""

    def wants_stop(self) -> bool:
        """Asked once a step; True on any rank ends the run after that step, with a checkpoint. While the prior scores,
        asked once a forward pass; what was scored is kept."""
        return False


@dataclass
class Position:
    """Where a run stands, as a checkpoint keeps it."""

    step: int = 0
    num_tokens: int = 0
    bad_steps: int = 0


@dataclass
class PreferenceTrainer:
    """Trains a policy on answers or pairs.

    Attributes:
        actor: its ``model`` is a DeepSpeed engine.
        cache: log-probs of the prior for every sample; None where the objective has no prior.
        export: writes the model to a folder; a collective call.
        starts_as_prior: at step 0 the policy is its own prior.
        identity: what checkpoints keep of :class:`RunIdentity`.
    """

    config: RunConfig
    loss: BatchLoss
    actor: PolicyActor
    strategy: Strategy
    train_set: TrainingSet
    eval_set: TrainingSet | None
    cache: PriorCache | None
    pad_token_id: int
    export: Callable[[str], None]
    starts_as_prior: bool
    identity: dict
    callbacks: tuple[Callback, ...] = ()
    position: Position = field(default_factory=Position)

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(self.train_set.num_units / self.config.train.batch_size)
        self.total_steps = self.steps_per_epoch * self.config.train.max_epochs
        self.micro_batch_size = self._usable_micro_batch_size()
        self.objective = self.loss.objective
        # float16 gradients need DeepSpeed's loss scale, which is known in the backward pass only.
        self.uses_single_pass_head = (
            self.config.train.fused_head
            and self.objective.token_loss is not None
            and self.config.ds.param_dtype != "fp16"
        )
        self.layout = self.actor.layout
        asked = self.config.train.group_by_length
        # Without grouping, batches and their order are OpenRLHF's, which compares pairs.
        self.groups_by_length = not self.objective.needs_pairs if asked is None else asked
        by_tokens = self.config.train.max_tokens_per_micro_batch is not None
        at_once = self.micro_batch_size * self.strategy.world_size
        if self.strategy.adds_up_in_bf16 and (by_tokens or self.config.train.batch_size > at_once):
            log.info("Gradients of micro-batches add up in bf16: --ds.zero_stage 1 or higher adds them up in float32")
        self.update_check = UpdateCheck(self.actor.model, self.strategy)

    def resume(self, checkpoint: str) -> None:
        """Restore ``checkpoint``; training goes on after its last step."""
        # DeepSpeed creates its optimizer state at the first update. A zero loss makes one without touching a weight
        # that is not overwritten right after.
        batch = next(self._micro_batches(self.train_set, by_size=False).answers(np.array([0]))).batch.to(device())
        output = self.actor(batch)
        nothing = (output.log_f.sum() + output.u.sum() + output.aux_loss) * 0.0
        self.strategy.backward(nothing, self.actor, is_last=True)
        self.actor.model.step()
        saved = load_checkpoint(checkpoint, self.actor.model, self.strategy)
        self.position = Position(**saved)
        log.info(f"Resumed from {checkpoint} after step {self.position.step} of {self.total_steps}")
        if self.config.ckpt.save_hf and self._is_due(self.config.ckpt.save_steps, every_epoch=False):
            export_step(self)  # the run may have ended between the checkpoint and this

    def fit(self) -> dict[str, float | None]:
        """Train to the end of the last epoch and return the last step's metrics.

        Raises:
            Stopped: a callback wanted to; the running step was finished and checkpointed.
            KeyboardInterrupt: the same where no checkpoint can be written.
            UserError: the loss or the gradient was NaN or infinite in more than --train.max_bad_steps steps.
        """
        metrics_log = MetricsLog(self.config, self.position.step) if self.strategy.is_rank_0() else None
        row: dict[str, float | None] = metrics_log.last if metrics_log is not None else {}
        bar = tqdm(
            total=self.total_steps,
            initial=self.position.step,
            desc="Train step",
            disable=not self.strategy.is_rank_0(),
        )
        micro_batches = self._micro_batches(self.train_set, by_size=self.groups_by_length)
        try:
            self._tell("on_train_begin")
            for epoch in range(self.position.step // self.steps_per_epoch, self.config.train.max_epochs):
                batches = global_batches(
                    self.train_set.num_units,
                    self.config.train.batch_size,
                    self.config.train.seed,
                    epoch,
                    micro_batches.prompts,
                )[self.position.step % self.steps_per_epoch :]
                steps = load_steps(batches, micro_batches, self.config.data.dataloader_num_workers)
                for units, step_batches in zip(batches, steps):
                    row, stopping = self._train_step(units, step_batches)
                    if self._is_due(self.config.eval.steps, every_epoch=True):
                        row.update({f"eval/{name}": value for name, value in self.evaluate().items()})
                    if metrics_log is not None:
                        metrics_log.write(row)
                    bar.set_postfix(loss="bad" if row["loss"] is None else f"{row['loss']:.4g}", refresh=False)
                    bar.update()
                    self._save_if_due(stopping)
                    self._tell("on_step_end", row)
        finally:
            bar.close()
            if metrics_log is not None:
                metrics_log.close()
            self._tell("on_train_end")
        return row

    def _tell(self, hook: str, *words) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *words)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | None]:
        """Loss and metrics over the whole evaluation set, taken as one global batch; one micro-batch in memory."""
        if self.eval_set is None:
            return {}
        everything = np.arange(self.eval_set.num_units)
        counts = _counts(self.eval_set, everything)
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        self.actor.model.eval()
        micro_batches = self._micro_batches(self.eval_set, by_size=True)
        z0 = self._reference_point(micro_batches.mismatched(everything))
        bar = tqdm(
            micro_batches.answers(everything),
            total=micro_batches.num_answers(everything),
            desc="Evaluation",
            disable=not self.strategy.is_rank_0(),
            leave=False,
        )
        for micro_batch in on_device(bar):
            batch = micro_batch.batch
            output = self.actor(batch)
            if not micro_batch.is_idle:
                loss = self.loss.share(output, batch, counts, z0)
                totals += batch_sums(self.objective, output.log_f, output.u, batch, loss, counts)
        self.actor.model.train()
        return means(self.objective, self.strategy.all_reduce(totals), z0)

    def _train_step(self, units: np.ndarray, step: StepBatches) -> tuple[dict, bool]:
        """One optimizer step on a global batch: its metrics, and whether some rank was asked to stop."""
        started = time.monotonic()
        engine = self.actor.model
        engine.train()
        lr = engine.lr_scheduler.get_last_lr()[0]
        counts = _counts(self.train_set, units)
        z0 = self._reference_point(step.mismatched)
        start_check = StartCheck(self.loss, counts, z0) if self.starts_as_prior and not self.position.step else None
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
        for number, micro_batch in enumerate(on_device(step.answers), start=1):
            batch = micro_batch.batch
            terms = self.loss.token_terms(batch, counts) if self.uses_single_pass_head else None
            output = self.actor(batch, terms)
            loss = self.loss.share(output, batch, counts, z0)
            if micro_batch.is_idle:
                loss = loss * 0.0
            else:
                totals += batch_sums(self.objective, output.log_f.detach(), output.u, batch, loss.detach(), counts)
                if start_check is not None:
                    start_check.add(output, batch)
            if is_last := number == len(step.answers):
                loss = spoil_if_bad(loss, totals[SUMS.index("loss")])
            self.strategy.backward(loss, self.actor, is_last)
        totals[SUMS.index("stop")] = float(any(callback.wants_stop() for callback in self.callbacks))
        totals = self.strategy.all_reduce(totals)
        metrics = means(self.objective, totals, z0)
        # Before the update, on all ranks alike: weights that a NaN has reached cannot be mended.
        global_loss = float(totals[SUMS.index("loss")])
        if math.isfinite(global_loss):
            if start_check is not None:
                start_check.report(self.strategy, global_loss, self.config.ds.param_dtype)
            self._tell("on_update_begin")
            self.update_check.before_update()
        grad_norm = self._step_engine()
        self.update_check.after_update(grad_norm)
        if not math.isfinite(global_loss):
            self._count_bad_step("loss", global_loss, units, counts, z0)
        # float16 overflows now and then: DeepSpeed lowers its loss scale.
        elif not math.isfinite(grad_norm) and self.config.ds.param_dtype != "fp16":
            self._count_bad_step("gradient", grad_norm, units, counts, z0)
        num_tokens = int(self.train_set.samples[self.train_set.rows(units)].column("length").sum(dtype=np.int64))
        self.position = replace(
            self.position, step=self.position.step + 1, num_tokens=self.position.num_tokens + num_tokens
        )
        row = {
            "step": self.position.step,
            "epoch": self.position.step / self.steps_per_epoch,
            **{name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()},
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": lr,
            "bad_steps": self.position.bad_steps,
            "num_tokens": self.position.num_tokens,
            "tokens_per_second": num_tokens / (time.monotonic() - started),
        }
        return row, bool(totals[SUMS.index("stop")])

    @torch.no_grad()
    def _reference_point(self, mismatched: Iterable[MicroBatch]) -> torch.Tensor:
        """KTO's z0: mean log-ratio of the global batch's mismatched completions, at least 0; no gradient."""
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        if not self.objective.needs_mismatched:
            return totals[0].float()
        for micro_batch in on_device(mismatched):
            batch = micro_batch.batch
            log_f = self.actor(batch, with_value=False).log_f
            if not micro_batch.is_idle:
                totals[0] += answers_of(log_f, batch, totals[0]).log_ratio.double().sum()
                totals[1] += len(log_f)
        total, count = self.strategy.all_reduce(totals)
        return (total / count.clamp(min=1)).clamp(min=0).float()

    def _step_engine(self) -> float:
        """Clip, update, and return the gradient norm before clipping.

        A gradient that is NaN or infinite changes nothing, neither weights nor moments nor the learning rate, and is
        forgotten.
        """
        engine = self.actor.model
        norm = math.nan
        if engine.zero_optimization_stage() == 0:
            # DeepSpeed reports no norm for a plain float32 optimizer.
            gradients = [one.grad for one in engine.module.parameters() if one.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm) and self.config.ds.param_dtype != "fp16":
                engine.module.zero_grad()
                return norm
        engine.step()
        if getattr(engine.optimizer, "overflow", False):
            return math.inf
        reported = engine.get_global_grad_norm()
        return float(reported if reported is not None else norm)

    def _count_bad_step(
        self, what: str, value: float, units: np.ndarray, counts: BatchCounts, z0: torch.Tensor
    ) -> None:
        """Raises UserError where it is one too many."""
        self.position = replace(self.position, bad_steps=self.position.bad_steps + 1)
        alone = self._micro_batches(self.train_set, by_size=False, alone=True)
        places = bad_records(alone, units, self.actor, self.loss, counts, z0)
        samples = self.train_set.samples[self.train_set.rows(units)]
        batch = list(dict.fromkeys(sample.where for sample in samples))
        most = self.config.train.max_bad_steps
        count_bad_step(self.position.step + 1, what, value, places, batch, self.position.bad_steps, most)

    def _micro_batches(self, data: TrainingSet, by_size: bool, alone: bool = False) -> MicroBatches:
        """Of ``data``; ``alone``: of one unit each."""
        collator = Collator(self.cache, self.pad_token_id, self.layout, self.loss.aux_coef > 0)
        rank, world_size = self.strategy.get_rank(), self.strategy.world_size
        return MicroBatches(
            data,
            collator,
            rank,
            world_size,
            1 if alone else self.micro_batch_size,
            by_size,
            None if alone else self.config.train.max_tokens_per_micro_batch,
            self.actor.policy.attention_work,
        )

    def _usable_micro_batch_size(self) -> int:
        asked, batch_size = self.config.train.micro_batch_size, self.config.train.batch_size
        share = math.ceil(batch_size / self.strategy.world_size)
        if asked > share and self.config.train.max_tokens_per_micro_batch is None:
            log.info(
                f"--train.micro_batch_size {asked} is more than a rank's share of --train.batch_size {batch_size}: "
                f"using {share}"
            )
        return min(asked, share)

    def _is_due(self, every: int, every_epoch: bool) -> bool:
        if every == -1:
            return every_epoch and self.position.step % self.steps_per_epoch == 0
        return self.position.step % every == 0

    def save_checkpoint(self, rotate: bool = True) -> None:
        """Write a checkpoint of this step; ``rotate`` drops the oldest beyond --ckpt.max_num and --ckpt.max_mem."""
        save_checkpoint(
            self.config.ckpt.folder,
            self.position.step,
            self.actor.model,
            self.strategy,
            position=asdict(self.position),
            identity=self.identity,
            max_num=self.config.ckpt.max_num if rotate else sys.maxsize,
            max_gb=self.config.ckpt.max_mem if rotate else math.inf,
        )

    def export_to(self, folder: str, unfinished: str | None = None) -> None:
        """Write the model to ``folder``, or to another that gets its name later; a collective call."""
        self._tell("on_export_begin", folder)
        self.export(unfinished or folder)

    def _save_if_due(self, stopping: bool) -> None:
        step = self.position.step
        due = self._is_due(self.config.ckpt.save_steps, every_epoch=False)
        # Muon's momentum has no place in a checkpoint; Adam has no moments before an update.
        engine = self.actor.model
        can_save = self.config.optim != "muon" and engine.global_steps > engine.skipped_steps
        if can_save and ((due and not self.config.ckpt.disable_ds) or stopping):
            self.save_checkpoint()
        if due and self.config.ckpt.save_hf:
            export_step(self)
        if stopping:
            if can_save:
                log.info(f"Stopped after step {step}; go on with --ckpt.load_enable")
                raise Stopped
            why_not = "--optim muon has none" if self.config.optim == "muon" else "every step was left out"
            log.info(f"Stopped after step {step}; no checkpoint was written: {why_not}")
            raise KeyboardInterrupt


def _counts(data: TrainingSet, units: np.ndarray) -> BatchCounts:
    samples = data.samples[data.rows(units)]
    loss_tokens, right_tokens, labels = map(samples.column, ("loss_tokens", "right_tokens", "answer_label"))
    return count_batch(loss_tokens, right_tokens, labels, data.unit_size)
