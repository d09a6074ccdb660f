"""Refuse flags that cannot work, before anything heavy is imported or loaded."""

import importlib.util
import math
import os
from types import SimpleNamespace

from pipa_openrlhf.data.sources import dataset_names, parse_probabilities
from pipa_openrlhf.errors import UserError

_POSITIVE = (
    "train.batch_size",
    "train.micro_batch_size",
    "train.max_epochs",
    "logger.logging_steps",
    "ckpt.max_num",
    "value.hidden_size",
)
_NOT_NEGATIVE = (
    "adam.lr",
    "value.lr",
    "pipa.sft_coef",
    "kto.sft_coef",
    "kto.desirable_weight",
    "kto.undesirable_weight",
    "model.nll_loss_coef",
    "ds.lora.rank",
    "ds.lora.dropout",
    "max_norm",
    "lr_warmup_ratio",
    "min_lr_ratio",
    "model.aux_loss_coef",
    "adam.weight_decay",
    "adam.eps",
    "data.dataloader_num_workers",
)
# The schedulers of transformers that need no more than the number of steps.
_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
_WITHOUT_EFFECT = {
    "train_pipa": ("model.beta", "model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
    "train_sft": (
        "model.beta",
        "model.ipo_enable",
        "model.label_smoothing",
        "model.nll_loss_coef",
        "ref.model_name_or_path",
    ),
    "train_kto": ("model.ipo_enable", "model.label_smoothing", "model.nll_loss_coef"),
    "train_dpo": (),
}


def check_training(args: SimpleNamespace, say=print) -> None:
    """Check the flags of a training module; note those without effect.

    Raises:
        UserError: one line naming the flag and the way out.
    """
    flat = args.flat
    for name in _POSITIVE:
        if flat.get(name) is not None and flat[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {flat[name]}")
    for name in _NOT_NEGATIVE:
        if flat.get(name) is not None and not flat[name] >= 0:
            raise UserError(f"--{name} must not be negative, got {flat[name]}")
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, got {value}")
    if not all(0 <= beta < 1 for beta in args.adam.betas):
        raise UserError(f"--adam.betas must be at least 0 and below 1, got {' '.join(map(str, args.adam.betas))}")
    for name in ("lr_warmup_ratio", "min_lr_ratio"):
        if flat[name] > 1:
            raise UserError(f"--{name} is a share, at most 1, got {flat[name]}")
    for name in ("ckpt.save_steps", "eval.steps"):
        if flat[name] != -1 and flat[name] < 1:
            raise UserError(f"--{name} must be -1 or at least 1, got {flat[name]}")
    if args.ds.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"--ds.zero_stage must be 0, 1, 2 or 3, got {args.ds.zero_stage}")
    if args.lr_scheduler not in _SCHEDULERS:
        raise UserError(f"--lr_scheduler {args.lr_scheduler} is not one of {', '.join(_SCHEDULERS)}")
    if not args.ds.lora.dropout < 1:
        raise UserError(f"--ds.lora.dropout must be below 1, got {args.ds.lora.dropout}")
    if args.ds.lora.rank > 0 and args.ds.lora.alpha < 1:
        raise UserError(f"--ds.lora.alpha must be at least 1, got {args.ds.lora.alpha}")
    if args.ckpt.merge_lora and not args.ds.lora.rank:
        raise UserError("--ckpt.merge_lora needs LoRA: give --ds.lora.rank, or leave it out for full fine-tuning")
    if args.ckpt.overwrite and args.ckpt.load_enable:
        raise UserError("--ckpt.overwrite deletes the run that --ckpt.load_enable would resume: give one of them")
    _check_model(args)
    check_data(args)
    _OBJECTIVE_CHECKS[args.module](args, say)
    _check_hardware_flags(args)
    for name in (*_WITHOUT_EFFECT[args.module], "ref.offload", "ds.use_universal_ckpt"):
        if name == "model.beta" and flat.get("pipa.objective_module"):
            continue  # the user's objective gets it
        if name in args.given and flat[name] != _default(args.module, name):
            say(f"--{name} has no effect in {args.module}")


def check_data(args: SimpleNamespace) -> None:
    """Check the data flags that every module shares."""
    names = dataset_names(args.data.dataset)
    if args.data.dataset_probs is not None:
        parse_probabilities(args.data.dataset_probs, len(names))
    if args.data.max_len < 2:
        raise UserError(f"--data.max_len must be at least 2, got {args.data.max_len}")
    if args.data.max_samples < 1:
        raise UserError(f"--data.max_samples must be at least 1, got {args.data.max_samples}")
    if not -1 <= args.data.step_threshold <= 1:
        raise UserError(f"--data.step_threshold must be between -1 and 1, got {args.data.step_threshold}")
    if args.data.tokenizer_chat_template and not args.data.apply_chat_template:
        raise UserError("--data.tokenizer_chat_template needs --data.apply_chat_template")
    if args.use_ms and importlib.util.find_spec("modelscope") is None:
        raise UserError("--use_ms needs the modelscope package: pip install modelscope")


def _check_model(args: SimpleNamespace) -> None:
    if not args.model.model_name_or_path:
        raise UserError("--model.model_name_or_path is missing: give a hub name, a folder or an adapter folder")
    check_model_path(args.model.model_name_or_path, "--model.model_name_or_path")
    if args.module == "train_sft":
        return
    if args.ref.model_name_or_path:
        if args.prior.model_name_or_path not in (None, args.ref.model_name_or_path):
            raise UserError("--ref.model_name_or_path and --prior.model_name_or_path name two priors: give one")
        args.prior.model_name_or_path = args.flat["prior.model_name_or_path"] = args.ref.model_name_or_path
    if args.prior.model_name_or_path:
        check_model_path(args.prior.model_name_or_path, "--prior.model_name_or_path")


def check_model_path(path: str, flag: str) -> None:
    """A path that looks local must hold a model or an adapter; anything else is left to the hub.

    Raises:
        UserError: there is no such folder, or it holds neither.
    """
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    if os.path.isdir(path):
        if not any(os.path.isfile(os.path.join(path, file)) for file in ("config.json", "adapter_config.json")):
            raise UserError(f"{flag} {path}: the folder has no config.json and no adapter_config.json")
    elif looks_local or os.path.exists(path):
        raise UserError(f"{flag} {path}: no such folder")


def _check_pipa(args: SimpleNamespace, say) -> None:
    if args.pipa.objective_module:
        _check_beta(args)
        if "pipa.variant" in args.given:
            say("--pipa.variant has no effect with --pipa.objective_module")
    fixed = args.pipa.fixed_value
    if fixed is not None:
        if not 0 < fixed < 1:
            raise UserError(f"--pipa.fixed_value is a probability between 0 and 1, got {fixed}")
        for name in ("value.hidden_size", "value.lr", "value.init_from"):
            if args.flat[name] is not None:
                raise UserError(f"--pipa.fixed_value replaces the value head: leave out --{name}")
    if not 0 < args.pipa.clip_eps < 1:
        raise UserError(f"--pipa.clip_eps must be between 0 and 1, got {args.pipa.clip_eps}")
    if args.value.init_from is not None:
        if args.value.hidden_size is not None:
            raise UserError("--value.init_from brings its own size: leave out --value.hidden_size")
        if not os.path.isfile(os.path.join(args.value.init_from, "value_head.safetensors")):
            raise UserError(f"--value.init_from {args.value.init_from}: no value_head.safetensors there")
    if args.optim == "muon" and args.value.lr is not None:
        raise UserError("--value.lr needs --optim adam: Muon takes one list of parameters")


def _check_dpo(args: SimpleNamespace, say) -> None:
    _check_beta(args)
    if args.data.pairing == "unpaired":
        raise UserError("--data.pairing unpaired: train_dpo compares pairs, give --data.pairing paired or given")
    if not 0 <= args.model.label_smoothing < 0.5:
        raise UserError(f"--model.label_smoothing must be at least 0 and below 0.5, got {args.model.label_smoothing}")
    if args.model.ipo_enable and args.data.annotation == "step":
        raise UserError("--model.ipo_enable has no step-level loss: use --data.annotation answer, or leave IPO out")
    if args.model.ipo_enable and args.model.label_smoothing:
        say("--model.label_smoothing has no effect with --model.ipo_enable")
    _note_step_loss(args, "dpo.step_loss", say)


def _check_kto(args: SimpleNamespace, say) -> None:
    _check_beta(args)
    if args.data.output_key and not args.data.input_key:
        raise UserError("--data.output_key needs --data.input_key, the column of the prompt")
    _note_step_loss(args, "kto.step_loss", say)


def _check_beta(args: SimpleNamespace) -> None:
    if not args.model.beta > 0:
        raise UserError(f"--model.beta must be above 0, got {args.model.beta}")


def _note_step_loss(args: SimpleNamespace, name: str, say) -> None:
    if name in args.given and args.data.annotation != "step":
        say(f"--{name} has no effect without --data.annotation step")


_OBJECTIVE_CHECKS = {
    "train_pipa": _check_pipa,
    "train_dpo": _check_dpo,
    "train_kto": _check_kto,
    "train_sft": lambda args, say: None,
}


def _check_hardware_flags(args: SimpleNamespace) -> None:
    ds = args.ds
    if ds.ring_attn_size > 1:
        raise UserError("--ds.ring_attn_size above 1 is not supported: use ZeRO-3 and gradient checkpointing")
    if ds.tensor_parallel_size > 1:
        raise UserError("--ds.tensor_parallel_size above 1 is not supported: use --ds.zero_stage 3")
    if ds.load_in_4bit:
        _need_package("ds.load_in_4bit", "bitsandbytes")
        if ds.param_dtype != "bf16":
            raise UserError("--ds.load_in_4bit needs --ds.param_dtype bf16")
        if not ds.lora.rank:
            raise UserError("--ds.load_in_4bit needs LoRA: give --ds.lora.rank")
        if ds.zero_stage == 3:
            raise UserError("--ds.load_in_4bit needs --ds.zero_stage 2 or lower")
    if ds.grad_accum_dtype == "fp32" and ds.param_dtype == "bf16" and ds.zero_stage == 0:
        raise UserError("--ds.grad_accum_dtype fp32 with bf16 weights needs --ds.zero_stage 1 or higher")
    if ds.use_liger_kernel:
        _need_package("ds.use_liger_kernel", "liger_kernel")
    if args.optim == "muon" and args.ckpt.save_steps != -1 and not args.ckpt.disable_ds:
        raise UserError("--optim muon cannot be checkpointed: leave out --ckpt.save_steps, or give --ckpt.disable_ds")


def _need_package(flag: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--{flag} needs the {package} package and a CUDA device: pip install {package}")


def _default(module: str, name: str):
    from pipa_openrlhf.cli.args import build_parser

    return build_parser(module).get_default(name)
