"""One training run from its config to its export: data, prior, policy, trainer."""

import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.data.record import write_bad_rows
from pipa_openrlhf.data.render import fix_template_date
from pipa_openrlhf.data.samples import Joined, Samples
from pipa_openrlhf.data.training_set import TrainingSet
from pipa_openrlhf.distributed.shared_files import check_seen_by_all
from pipa_openrlhf.distributed.strategy import Strategy, on_cpu, slow_dtype_hint
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.fit import check_same_tokens, check_vocabulary
from pipa_openrlhf.model.loading import load_tokenizer, resolve_attention, use_modelscope
from pipa_openrlhf.model.policy import PolicyActor, build_policy
from pipa_openrlhf.model.self_check import choose_layout
from pipa_openrlhf.objectives.batch_loss import BatchLoss
from pipa_openrlhf.objectives.kto import mismatched_completions
from pipa_openrlhf.objectives.objective import Objective
from pipa_openrlhf.prior.cache import PriorCache
from pipa_openrlhf.prior.fill import fill_from_policy, fill_from_separate_model, open_cache
from pipa_openrlhf.settings import flatten, updated
from pipa_openrlhf.training.checks import report_trained
from pipa_openrlhf.training.diagnosis import diagnose
from pipa_openrlhf.training.export import (
    MERGED_BASE,
    check_export,
    drop_rescue,
    export_finished,
    export_model,
    write_config,
)
from pipa_openrlhf.training.identity import RunIdentity, Start, find_start, identify
from pipa_openrlhf.training.model_card import write_model_card
from pipa_openrlhf.training.records import read_metrics
from pipa_openrlhf.training.run_folder import check_output_dir, claim_folders, read_by_all, run_folders
from pipa_openrlhf.training.run_lock import alone_in
from pipa_openrlhf.training.trainer import Callback, PreferenceTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        output_dir: the exported model.
        steps: optimizer steps of the whole run.
        metrics: of the last step, as in ``metrics.jsonl``; empty on ranks but the first, and where the folder held
            this very run already.
    """

    output_dir: str
    steps: int
    metrics: dict


@dataclass(frozen=True)
class _Data:
    train_set: TrainingSet
    eval_set: TrainingSet | None
    bad_rows: list[tuple[str, str]]

    @property
    def scored(self) -> Samples:
        """Everything the prior must score."""
        return Joined([one.scored_by_prior() for one in (self.train_set, self.eval_set) if one is not None])


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Result:
    """Train, and export to ``config.ckpt.output_dir``.

    Every rank of a process group calls it; without a launcher this process is a group of one. It reads no command
    line and touches no signal, so that it may be called from a notebook, a Ray worker or a test.

    Raises:
        Stopped: a callback wanted to; what was done is on disk.
        UserError: anything the user can put right.
    """
    config, objective = checked(config)
    for line in idle_flags(config):
        log.info(line)
    check_output_dir(config)
    with _alone(config):
        return _train_alone(config, objective, callbacks)


def checked(config: RunConfig) -> tuple[RunConfig, Objective]:
    """The config with one name for its prior, and its objective.

    Raises:
        UserError: the flags do not fit each other.
    """
    config.check()
    objective = config.objective.make_objective(config)
    if objective.needs_prior:
        config = updated(config, {"prior.model_name_or_path": config.prior_path})
    if objective.needs_step_labels and config.data.annotation != "step":
        raise UserError(f"{objective.name} needs step labels: give --data.annotation step")
    return config, objective


def score_prior(config: RunConfig, started: str | None = None) -> RunIdentity:
    """Put the prior's log-probs of everything that a run will need into the cache, and train nothing. Every rank of a
    process group calls it, as :func:`train`.

    Args:
        started: ISO time at which chat templates believe to be; None: now.

    Returns:
        What decides the run, its data included.

    Raises:
        UserError: anything the user can put right.
    """
    config, objective = checked(config)
    here, strategy = _join(config, objective)
    identity = strategy.from_rank_0(lambda: identify(config, objective, started))
    tokenizer, data = _read_inputs(config, objective, identity)
    identity = Start(identity).with_data(data.train_set.fingerprint(), strategy).identity
    if objective.needs_prior:
        check_seen_by_all({"--prior.cache_dir": config.prior.cache_dir}, strategy)
        cache = open_cache(here, strategy)
        fill_from_separate_model(here, cache, data.scored, strategy, tokenizer.pad_token_id)
    return identity


@contextmanager
def _alone(config: RunConfig) -> Iterator[None]:
    """Hold the locks of the folders that a run writes to, on rank 0: the others meet it when they join."""
    with ExitStack() as held:
        if os.environ.get("RANK", "0") == "0":
            output_dir, checkpoints = (os.path.realpath(one) for one in (config.ckpt.output_dir, config.ckpt.folder))
            held.enter_context(alone_in(config.ckpt.output_dir))
            if os.path.commonpath([output_dir, checkpoints]) != output_dir:
                held.enter_context(alone_in(config.ckpt.folder))
            check_output_dir(config)  # a run that held a lock may have ended here meanwhile
        yield


def _train_alone(config: RunConfig, objective: Objective, callbacks: Sequence[Callback]) -> Result:
    here, strategy = _join(config, objective)
    check_seen_by_all(read_by_all(config, objective.needs_prior), strategy)
    start = find_start(config, objective, strategy)
    tokenizer, data = _read_inputs(config, objective, start.identity)
    start = start.with_data(data.train_set.fingerprint(), strategy)
    steps = config.train.max_epochs * math.ceil(data.train_set.num_units / config.train.batch_size)
    if start.finished:
        log.info(f"{config.ckpt.output_dir} already holds this run, finished after {steps} steps")
        return Result(config.ckpt.output_dir, steps, {})

    folders = run_folders(config, tokenizer)
    strategy.from_rank_0(lambda: claim_folders(folders, config.ckpt.overwrite))
    strategy.from_rank_0(lambda: write_bad_rows(config.ckpt.output_dir, data.bad_rows))
    check_export(config, tokenizer, strategy)
    actor, cache, starts_as_prior = _prepare_models(
        here, objective, start, data.scored, strategy, tokenizer, steps, callbacks
    )
    trainer = PreferenceTrainer(
        config=config,
        loss=BatchLoss(objective, config.model.aux_loss_coef),
        actor=actor,
        strategy=strategy,
        train_set=data.train_set,
        eval_set=data.eval_set,
        cache=cache,
        pad_token_id=tokenizer.pad_token_id,
        export=partial(
            export_model,
            config=config,
            engine=actor.model,
            strategy=strategy,
            tokenizer=tokenizer,
            merged_base=os.path.join(config.ckpt.output_dir, MERGED_BASE),
        ),
        starts_as_prior=starts_as_prior,
        identity=start.identity.record(),
        callbacks=tuple(callbacks),
    )
    return _fit(trainer, start, objective, folders, steps)


def _join(config: RunConfig, objective: Objective) -> tuple[RunConfig, Strategy]:
    """The config with what can run here, and the process group."""
    here = _for_this_machine(config)
    strategy = Strategy(here, value_lr=config.value.lr if objective.needs_value_head else None)
    strategy.setup_distributed()
    return here, strategy


def _read_inputs(
    config: RunConfig, objective: Objective, identity: RunIdentity
) -> tuple[PreTrainedTokenizerBase, _Data]:
    tokenizer = load_tokenizer(
        config.model.path, not config.data.disable_fast_tokenizer, config.model.trust_remote_code
    )
    fix_template_date(tokenizer, identity.started)
    data = _load_data(config, objective, tokenizer)
    _check_tokens(config, objective, data.scored, tokenizer)
    return tokenizer, data


def idle_flags(config: RunConfig) -> list[str]:
    """Lines about flags that were set to something and change nothing."""
    module = config.objective.module
    default = flatten(RunConfig(objective=type(config.objective)()))
    values = flatten(config)
    names = (*config.objective.without_effect, "ref.offload", "ds.use_universal_ckpt")
    user_file = values.get("pipa.objective_module")  # it gets the model's settings
    idle = [name for name in names if values[name] != default[name] and not (user_file and name == "model.beta")]
    return config.objective.idle_flags(config) + [f"--{name} has no effect in {module}" for name in idle]


def _for_this_machine(config: RunConfig) -> RunConfig:
    """The config with what can run here in place of what cannot."""
    dtype = config.ds.param_dtype
    if dtype == "fp16" and on_cpu():
        raise UserError("--ds.param_dtype fp16 needs an accelerator: use bf16 or fp32")
    if hint := slow_dtype_hint(dtype):
        log.info(hint)
    attention = resolve_attention(config.ds.attn_implementation, dtype)
    if config.use_ms:
        use_modelscope()
    return updated(config, {"ds.attn_implementation": attention})


def _prepare_models(
    config: RunConfig,
    objective: Objective,
    start: Start,
    scored: Samples,
    strategy: Strategy,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    callbacks: Sequence[Callback],
) -> tuple[PolicyActor, PriorCache | None, bool]:
    """The policy in its engine, the prior's log-probs, and whether the policy is its own prior now."""
    # At step 0 the policy itself is the prior, unless that is another model; after a resume it no longer is.
    cache = open_cache(config, strategy) if objective.needs_prior else None
    is_separate = bool(config.prior_path or start.checkpoint)
    if cache is not None and is_separate:
        fill_from_separate_model(config, cache, scored, strategy, tokenizer.pad_token_id, callbacks)
    actor = build_policy(config, objective, strategy.get_ds_train_config())
    report_trained(actor.model)
    actor, _, _ = strategy.prepare((actor, _optimizer_config(config, steps)))
    choose_layout(config, actor, scored, strategy, tokenizer.pad_token_id)
    if cache is not None and not is_separate:
        fill_from_policy(config, cache, scored, actor, strategy, tokenizer.pad_token_id, callbacks)
    return actor, cache, cache is not None and not is_separate


def _fit(trainer: PreferenceTrainer, start: Start, objective: Objective, folders: list, steps: int) -> Result:
    """Resume where there is a checkpoint, train, export."""
    config, strategy = trainer.config, trainer.strategy
    resolved = {
        "ckpt.path": config.ckpt.folder,
        "identity": start.identity.record(),
        "ds.attn_implementation": trainer.actor.attention,
        "objective": objective.name,
        "total_steps": steps,
        "train.micro_batch_size": trainer.micro_batch_size,
        "train_units": trainer.train_set.num_units,
        "world_size": strategy.world_size,
    }
    if start.checkpoint is not None:
        trainer.resume(start.checkpoint)
    if strategy.is_rank_0():
        write_config(config, resolved)
    last = trainer.fit()
    export_finished(trainer)
    if strategy.is_rank_0():
        write_model_card(config.ckpt.output_dir, config, objective.name, last)
        write_config(config, {**resolved, "finished": True})
        drop_rescue(config, trainer.position.step)
        for folder in folders:
            folder.close()
        log.info(f"Model written to {config.ckpt.output_dir}")
        for finding in diagnose(read_metrics(config.ckpt.output_dir), flatten(config)):
            log.info(str(finding))
    strategy.barrier()
    return Result(config.ckpt.output_dir, steps, last)


def _load_data(config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> _Data:
    bad_rows = []

    def load(**source) -> TrainingSet:
        loaded = load_samples(
            config,
            tokenizer,
            pairs_only=objective.needs_pairs,
            keep=objective.keep,
            **source,
        )
        samples = loaded.samples
        bad_rows.extend(loaded.bad_rows)
        return TrainingSet(
            samples,
            unit_size=2 if objective.needs_pairs else 1,
            mismatched=mismatched_completions(samples, config.data.max_len) if objective.needs_mismatched else None,
        )

    data = config.data
    train_set = load(dataset=data.dataset, probs=data.dataset_probs, split=data.dataset_split)
    if not config.eval.dataset:
        return _Data(train_set, None, bad_rows)
    eval_set = load(dataset=config.eval.dataset, split=config.eval.split, max_samples=sys.maxsize)
    return _Data(train_set, eval_set, bad_rows)


def _check_tokens(
    config: RunConfig, objective: Objective, samples: Samples, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = samples.token_ids()
    remote = config.model.trust_remote_code
    check_vocabulary(config.model.path, "--model.model_name_or_path", token_ids, remote)
    if objective.needs_prior and config.prior_path:
        flag = "--prior.model_name_or_path"
        check_same_tokens(config.prior_path, flag, token_ids, tokenizer, remote)
        check_vocabulary(config.prior_path, flag, token_ids, remote)


def _optimizer_config(config: RunConfig, steps: int) -> dict:
    return dict(
        optim=config.optim,
        muon=asdict(config.muon),
        adam=asdict(config.adam),
        lr_scheduler=config.lr_scheduler,
        lr_warmup_ratio=config.lr_warmup_ratio,
        min_lr_ratio=config.min_lr_ratio,
        max_norm=config.max_norm,
        scheduler_steps=steps,
    )


class StopOnSignals(Callback):
    """While the prior scores and while training goes, the first SIGINT or SIGTERM only asks the run to stop.

    A second ctrl-C interrupts at once. The handlers of before come back at the end. Main thread only.
    """

    def __init__(self):
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}

    def on_prior_begin(self) -> None:
        """Take the signals over."""
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_prior_end(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_train_begin(self, trainer) -> None:
        """Take the signals over."""
        self.on_prior_begin()

    def on_train_end(self, trainer) -> None:
        """Give them back."""
        self.on_prior_end()

    def wants_stop(self) -> bool:
        """Whether a signal came."""
        return bool(self._received)

    @property
    def was_interrupted(self) -> bool:
        """Whether ctrl-C was among them, which ends more than this process; SIGTERM alone asks for an orderly end."""
        return signal.SIGINT in self._received

    def _on_signal(self, number: int, _frame) -> None:
        # On ctrl-C a launcher sends SIGTERM on top of the terminal's SIGINT; only a second ctrl-C means "at once".
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        self._received.append(number)
