"""One training run from flags to export: data, prior, policy, trainer."""

import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.data.template_date import fix_template_date
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.data.training_set import TrainingSet, mismatched_completions
from pipa_openrlhf.distributed.devices import on_cpu, slow_dtype_hint
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.models.build import build_policy
from pipa_openrlhf.models.loading import load_tokenizer, resolve_attention, use_modelscope
from pipa_openrlhf.models.self_check import choose_layout
from pipa_openrlhf.models.vocabulary import check_same_tokens, check_vocabulary
from pipa_openrlhf.trainer.batch_loss import BatchLoss, LossSettings
from pipa_openrlhf.trainer.earlier_run import find_start
from pipa_openrlhf.trainer.export import MERGED_BASE, export_model, write_args, write_model_card
from pipa_openrlhf.trainer.final_export import check_export, export_finished
from pipa_openrlhf.trainer.output_dir import check_output_dir, claim_folders, run_folders
from pipa_openrlhf.trainer.preference_trainer import PreferenceTrainer
from pipa_openrlhf.trainer.prior_pass import fill_from_policy, fill_from_separate_model, open_cache
from pipa_openrlhf.trainer.trained import report_trained


def train(
    args: SimpleNamespace,
    objective: Objective,
    settings: LossSettings,
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
) -> None:
    """Train, and export to ``--ckpt.output_dir``.

    Args:
        stopping: open while training runs; what it gives is asked once a step whether to checkpoint and end.

    Raises:
        UserError: anything the user can put right.
    """
    say = print if int(os.environ.get("RANK", "0")) == 0 else _silent
    if objective.needs_step_labels and args.data.annotation != "step":
        raise UserError(f"{objective.name} needs step labels: give --data.annotation step")
    checkpoint_folder = args.ckpt.path or os.path.join(args.ckpt.output_dir, "checkpoints")
    check_output_dir(args, checkpoint_folder)
    if args.ds.param_dtype == "fp16" and on_cpu():
        raise UserError("--ds.param_dtype fp16 needs an accelerator: use bf16 or fp32")
    if hint := slow_dtype_hint(args.ds.param_dtype):
        say(hint)
    args.ds.attn_implementation = resolve_attention(args.ds.attn_implementation, args.ds.param_dtype, say)
    if args.use_ms:
        use_modelscope()
    strategy = Strategy(args, value_lr=args.value.lr if objective.needs_value_head else None)
    strategy.setup_distributed()
    start = find_start(args, objective, checkpoint_folder, strategy)
    tokenizer = load_tokenizer(
        args.model.model_name_or_path, not args.data.disable_fast_tokenizer, args.model.trust_remote_code
    )
    fix_template_date(tokenizer, start.identity.started)
    train_set, eval_set = _load_data(args, objective, tokenizer, say)
    scored = train_set.scored_by_prior() + (eval_set.scored_by_prior() if eval_set else [])
    _check_tokens(args, objective, scored, tokenizer)
    start = start.with_data(train_set.fingerprint(), strategy)
    steps = args.train.max_epochs * math.ceil(train_set.num_units / args.train.batch_size)
    if start.finished:
        say(f"{args.ckpt.output_dir} already holds this run, finished after {steps} steps")
        return

    folders = run_folders(args, checkpoint_folder, tokenizer)
    strategy.from_rank_0(lambda: claim_folders(folders, args.ckpt.overwrite))

    check_export(args, tokenizer, checkpoint_folder, strategy)
    # At step 0 the policy itself is the prior, unless that is another model; after a resume it no longer is.
    cache = open_cache(args, strategy) if objective.needs_prior else None
    separate_prior = bool(args.prior.model_name_or_path or start.checkpoint) if cache is not None else False
    if separate_prior:
        fill_from_separate_model(args, cache, scored, strategy, tokenizer.pad_token_id)
    with_value_head = objective.needs_value_head and settings.fixed_value is None
    actor = build_policy(
        args, with_value_head, settings.fixed_value, settings.aux_coef > 0, strategy.get_ds_train_config(), say
    )
    report_trained(actor.model, say)
    actor, _, _ = strategy.prepare((actor, _optimizer_config(args, steps)))
    choose_layout(args, actor, scored, strategy, tokenizer.pad_token_id)
    if cache is not None and not separate_prior:
        fill_from_policy(args, cache, scored, actor, strategy, tokenizer.pad_token_id)

    export = partial(
        export_model,
        engine=actor.model,
        strategy=strategy,
        tokenizer=tokenizer,
        base_path=args.model.model_name_or_path,
        merge_lora=args.ckpt.merge_lora,
        trust_remote_code=args.model.trust_remote_code,
        merged_base=os.path.join(args.ckpt.output_dir, MERGED_BASE),
    )
    trainer = PreferenceTrainer(
        args=args,
        loss=BatchLoss(objective, settings),
        actor=actor,
        strategy=strategy,
        train_set=train_set,
        eval_set=eval_set,
        cache=cache,
        pad_token_id=tokenizer.pad_token_id,
        checkpoint_folder=checkpoint_folder,
        export=export,
        starts_as_prior=cache is not None and not separate_prior,
        identity=start.identity.record(),
    )
    resolved = {
        "ckpt.path": checkpoint_folder,
        "identity": start.identity.record(),
        "ds.attn_implementation": args.ds.attn_implementation,
        "objective": objective.name,
        "total_steps": steps,
        "train.micro_batch_size": trainer.micro_batch_size,
        "train_units": train_set.num_units,
        "world_size": strategy.world_size,
    }
    if start.checkpoint is not None:
        trainer.resume(start.checkpoint)
    if strategy.is_rank_0():
        write_args(args.ckpt.output_dir, args.flat, resolved)
    with stopping() as stop:
        last = trainer.fit(stop)
    export_finished(trainer)
    if strategy.is_rank_0():
        command = f"python -m pipa_openrlhf.cli.{args.module} {shlex.join(_shown(sys.argv[1:]))}"
        write_model_card(
            args.ckpt.output_dir, objective.name, args.model.model_name_or_path, args.data.dataset, command, last
        )
        write_args(args.ckpt.output_dir, args.flat, {**resolved, "finished": True})
        for folder in folders:
            folder.close()
        say(f"Model written to {args.ckpt.output_dir}")
    strategy.barrier()


def _load_data(
    args: SimpleNamespace, objective: Objective, tokenizer: PreTrainedTokenizerBase, say
) -> tuple[TrainingSet, TrainingSet | None]:
    def load(**source) -> TrainingSet:
        samples = load_samples(args, tokenizer, pairs_only=objective.needs_pairs, say=say, **source).samples
        return TrainingSet(
            samples,
            unit_size=2 if objective.needs_pairs else 1,
            mismatched=mismatched_completions(samples, args.data.max_len) if objective.needs_mismatched else (),
        )

    data = args.data
    train_set = load(dataset=data.dataset, probs=data.dataset_probs, split=data.dataset_split)
    if not args.eval.dataset:
        return train_set, None
    return train_set, load(dataset=args.eval.dataset, split=args.eval.split, max_samples=sys.maxsize)


def _check_tokens(
    args: SimpleNamespace, objective: Objective, samples: list[Sample], tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = np.unique(np.concatenate([sample.input_ids for sample in samples]))
    remote = args.model.trust_remote_code
    check_vocabulary(args.model.model_name_or_path, "--model.model_name_or_path", token_ids, remote)
    if objective.needs_prior and args.prior.model_name_or_path:
        prior, flag = args.prior.model_name_or_path, "--prior.model_name_or_path"
        check_same_tokens(prior, flag, token_ids, tokenizer, remote)
        check_vocabulary(prior, flag, token_ids, remote)


def _optimizer_config(args: SimpleNamespace, steps: int) -> dict:
    return dict(
        optim=args.optim,
        muon=vars(args.muon),
        adam=vars(args.adam),
        lr_scheduler=args.lr_scheduler,
        lr_warmup_ratio=args.lr_warmup_ratio,
        min_lr_ratio=args.min_lr_ratio,
        max_norm=args.max_norm,
        scheduler_steps=steps,
    )


def _shown(argv: list[str]) -> list[str]:
    """The command without the wandb key and the launcher's rank."""
    shown = [word for word in argv if not word.startswith("--local_rank")]
    key = "--logger.wandb.key"
    for position, word in enumerate(shown):
        if word.startswith(f"{key}="):
            shown[position] = f"{key}=<hidden>"
        elif position and shown[position - 1] == key:
            shown[position] = "<hidden>"
    return shown


def _silent(*_message) -> None:
    pass
