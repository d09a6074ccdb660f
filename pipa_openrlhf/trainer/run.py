"""One training run from flags to export: data, prior, policy, trainer."""

import gc
import glob
import json
import math
import os
import shlex
import shutil
import sys
from types import SimpleNamespace

import torch

from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.data.prior_cache import PriorCache
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.distributed.devices import dtype_of, on_cpu
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.models.identity import weights_id
from pipa_openrlhf.models.loading import load_causal_lm, load_tokenizer, resolve_attention
from pipa_openrlhf.models.policy import Policy, PolicyActor, add_lora
from pipa_openrlhf.models.value_head import ValueHead, load_value_head
from pipa_openrlhf.trainer.checkpoint import newest_checkpoint
from pipa_openrlhf.trainer.export import export_model, write_args, write_model_card
from pipa_openrlhf.trainer.preference_trainer import LossSettings, PreferenceTrainer, usable_micro_batch_size
from pipa_openrlhf.trainer.prior_pass import count_missing, fill_cache

# Files that only a run leaves in its output folder.
_TRACES = ("args.json", "metrics.jsonl", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")
# Everything that a run writes there; --ckpt.overwrite touches nothing else.
_WRITTEN = (*_TRACES, "adapter_model*", "model*.safetensors", "value_head*", "README.md", "merged_base")


def train(args: SimpleNamespace, objective: Objective, loss: LossSettings) -> None:
    """Train, and export to ``--ckpt.output_dir``.

    Raises:
        UserError: anything the user can put right.
    """
    say = print if int(os.environ.get("RANK", "0")) == 0 else _silent
    checkpoint_folder = args.ckpt.path or os.path.join(args.ckpt.output_dir, "checkpoints")
    _check_output_dir(args, checkpoint_folder)
    if args.ds.param_dtype == "fp16" and on_cpu():
        raise UserError("--ds.param_dtype fp16 needs an accelerator: use bf16 or fp32")
    args.ds.attn_implementation = resolve_attention(args.ds.attn_implementation, say)

    tokenizer = load_tokenizer(
        args.model.model_name_or_path, not args.data.disable_fast_tokenizer, args.model.trust_remote_code
    )
    train_samples, eval_samples = _load_data(args, tokenizer, say)

    strategy = Strategy(args, value_lr=args.value.lr if objective.needs_value_head else None)
    strategy.setup_distributed()
    _check_batch_size(args, strategy)
    if args.ckpt.overwrite and strategy.is_rank_0():
        _delete_run(args.ckpt.output_dir, checkpoint_folder)
    strategy.barrier()
    os.makedirs(args.ckpt.output_dir, exist_ok=True)

    checkpoint = newest_checkpoint(checkpoint_folder, say) if args.ckpt.load_enable else None
    if args.ckpt.load_enable and checkpoint is None:
        say(f"No checkpoint in {checkpoint_folder}: starting from step 0")

    steps = args.train.max_epochs * math.ceil(len(train_samples) / args.train.batch_size)
    if args.ckpt.load_enable and _finished_steps(args.ckpt.output_dir) == steps:
        say(f"{args.ckpt.output_dir} already holds this run, finished after {steps} steps")
        return

    cache = open_cache(args, strategy) if objective.needs_prior else None
    every_sample = train_samples + eval_samples
    if cache is not None and (args.prior.model_name_or_path or checkpoint):
        # At step 0 the policy itself is the prior, see below; here it is another model, or no longer the prior.
        _fill_from_separate_model(args, cache, every_sample, strategy, tokenizer.pad_token_id)

    actor = build_actor(args, objective, loss, strategy)
    actor, _, _ = strategy.prepare((actor, _optimizer_config(args, steps)))
    if cache is not None:
        _fill_from_policy(args, cache, every_sample, actor, strategy, tokenizer.pad_token_id)

    def export(folder: str) -> None:
        export_model(
            folder,
            actor.model,
            strategy,
            tokenizer,
            args.model.model_name_or_path,
            args.ckpt.merge_lora,
            args.model.trust_remote_code,
        )

    trainer = PreferenceTrainer(
        args=args,
        objective=objective,
        loss=loss,
        actor=actor,
        strategy=strategy,
        train_samples=train_samples,
        eval_samples=eval_samples,
        cache=cache,
        pad_token_id=tokenizer.pad_token_id,
        checkpoint_folder=checkpoint_folder,
        export=export,
    )
    resolved = {
        "ckpt.path": checkpoint_folder,
        "ds.attn_implementation": args.ds.attn_implementation,
        "train.micro_batch_size": trainer.micro_batch_size,
        "train_samples": len(train_samples),
        "total_steps": trainer.total_steps,
        "world_size": strategy.world_size,
    }
    if strategy.is_rank_0():
        write_args(args.ckpt.output_dir, args.flat, resolved)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    last = trainer.fit()
    export(args.ckpt.output_dir)
    if strategy.is_rank_0():
        write_model_card(
            args.ckpt.output_dir,
            objective.name,
            args.model.model_name_or_path,
            args.data.dataset,
            f"python -m pipa_openrlhf.cli.{args.module} " + shlex.join(_shown(sys.argv[1:])),
            last,
        )
        write_args(args.ckpt.output_dir, args.flat, {**resolved, "finished": True})
        say(f"Model written to {args.ckpt.output_dir}")
    strategy.barrier()


def build_actor(args: SimpleNamespace, objective: Objective, loss: LossSettings, strategy: Strategy) -> PolicyActor:
    """The policy: model, then LoRA, then the value head (all-linear LoRA would wrap a head attached before it)."""
    lm = _load_lm(args, args.model.model_name_or_path, strategy.get_ds_train_config())
    hidden_size = lm.config.get_text_config().hidden_size
    dtype = dtype_of(args.ds.param_dtype)
    if args.ds.lora.rank > 0:
        lora = args.ds.lora
        lm = add_lora(lm, lora.rank, lora.alpha, lora.target_modules, lora.dropout)
    head = None
    if objective.needs_value_head and loss.fixed_value is None:
        if args.value.init_from:
            head = load_value_head(args.value.init_from, dtype)
            if head.dense.in_features != hidden_size:
                raise UserError(
                    f"--value.init_from {args.value.init_from}: made for hidden size {head.dense.in_features}, "
                    f"the model has {hidden_size}"
                )
        else:
            head = ValueHead(hidden_size, args.value.hidden_size or hidden_size, dtype)
    actor = PolicyActor(Policy(lm, head))
    if args.model.gradient_checkpointing_enable:
        actor.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": args.model.gradient_checkpointing_reentrant}
        )
    return actor


def open_cache(args: SimpleNamespace, strategy: Strategy) -> PriorCache:
    """The cache of this run's prior."""
    path = args.prior.model_name_or_path or args.model.model_name_or_path
    identity = [weights_id(path, args.prior.cache_dir) if strategy.is_rank_0() else None]
    torch.distributed.broadcast_object_list(identity)
    precision = args.ds.param_dtype + ("-4bit" if args.ds.load_in_4bit else "")
    return PriorCache(args.prior.cache_dir, identity[0], precision)


def _fill_from_separate_model(
    args: SimpleNamespace, cache: PriorCache, samples: list[Sample], strategy: Strategy, pad_token_id: int
) -> None:
    absent = count_missing(cache, samples, strategy)
    _report(strategy, samples, absent, cache)
    if not absent.any():
        return
    path = args.prior.model_name_or_path or args.model.model_name_or_path
    strategy.print(f"Loading the prior {path}")
    actor = strategy.prepare(PolicyActor(Policy(_load_lm(args, path, strategy.get_ds_eval_config()))))
    _fill(args, cache, samples, absent, actor, strategy, pad_token_id)
    actor.model.destroy()
    del actor
    gc.collect()


def _fill_from_policy(
    args: SimpleNamespace,
    cache: PriorCache,
    samples: list[Sample],
    actor: PolicyActor,
    strategy: Strategy,
    pad_token_id: int,
) -> None:
    """Before the first update the policy is the SFT model (LoRA's B is zero), so it is its own prior."""
    absent = count_missing(cache, samples, strategy)
    if not args.prior.model_name_or_path:
        _report(strategy, samples, absent, cache)
    if absent.any():
        _fill(args, cache, samples, absent, actor, strategy, pad_token_id)


def _fill(args, cache, samples, absent, actor, strategy, pad_token_id) -> None:
    actor.model.eval()
    fill_cache(
        cache,
        [sample for sample, is_absent in zip(samples, absent) if is_absent],
        lambda batch: actor(batch)[0],
        strategy,
        pad_token_id,
        args.ds.packing_samples,
        usable_micro_batch_size(args, strategy.world_size),
    )


def _report(strategy: Strategy, samples: list[Sample], absent, cache: PriorCache) -> None:
    strategy.print(
        f"Prior cache: {len(samples) - int(absent.sum())} hits, {int(absent.sum())} misses in {cache.folder}"
    )


def _load_lm(args: SimpleNamespace, path: str, ds_config: dict):
    return load_causal_lm(
        path,
        dtype_of(args.ds.param_dtype),
        args.ds.attn_implementation,
        args.model.trust_remote_code,
        args.ds.experts_implementation,
        args.ds.load_in_4bit,
        args.ds.use_liger_kernel,
        ds_config,
    )


def _load_data(args: SimpleNamespace, tokenizer, say) -> tuple[list[Sample], list[Sample]]:
    data = args.data
    training = load_samples(
        args, tokenizer, dataset=data.dataset, probs=data.dataset_probs, split=data.dataset_split, say=say
    )
    if not args.eval.dataset:
        return training.samples, []
    evaluation = load_samples(
        args, tokenizer, dataset=args.eval.dataset, split=args.eval.split, max_samples=sys.maxsize, say=say
    )
    return training.samples, evaluation.samples


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


def _check_output_dir(args: SimpleNamespace, checkpoint_folder: str) -> None:
    output_dir = args.ckpt.output_dir
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise UserError(f"--ckpt.output_dir {output_dir} is a file: give a folder")
    if args.ckpt.overwrite or args.ckpt.load_enable:
        return
    if any(os.path.exists(os.path.join(output_dir, name)) for name in _TRACES) or (
        os.path.isdir(checkpoint_folder) and os.listdir(checkpoint_folder)
    ):
        raise UserError(
            f"--ckpt.output_dir {output_dir} holds another run: resume it with --ckpt.load_enable, delete it with "
            "--ckpt.overwrite, or give another folder"
        )


def _finished_steps(output_dir: str) -> int | None:
    try:
        with open(os.path.join(output_dir, "args.json")) as file:
            record = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record.get("resolved.total_steps") if record.get("resolved.finished") else None


def _delete_run(output_dir: str, checkpoint_folder: str) -> None:
    paths = {path for name in _WRITTEN for path in glob.glob(os.path.join(glob.escape(output_dir), name))}
    paths.update(glob.glob(os.path.join(glob.escape(checkpoint_folder), "global_step*")))
    for path in paths:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def _check_batch_size(args: SimpleNamespace, strategy: Strategy) -> None:
    usable = usable_micro_batch_size(args, strategy.world_size)
    if usable < args.train.micro_batch_size:
        strategy.print(
            f"--train.micro_batch_size {args.train.micro_batch_size} is more than a rank's share of "
            f"--train.batch_size {args.train.batch_size}: using {usable}"
        )


def _shown(argv: list[str]) -> list[str]:
    """The command without the wandb key and the launcher's rank."""
    shown = [word for word in argv if not word.startswith("--local_rank")]
    for position, word in enumerate(shown[:-1]):
        if word == "--logger.wandb.key":
            shown[position + 1] = "<hidden>"
    return shown


def _silent(*_message) -> None:
    pass
