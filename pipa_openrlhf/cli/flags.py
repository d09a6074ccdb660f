"""From words of a command line and a YAML file to a config.

The flags are the fields of the config's dataclasses (``settings.py``); what is here is how they are written down.
Nothing heavy is imported: a wrong flag is reported before transformers, DeepSpeed or a model is loaded.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.objectives.table import FAMILIES
from pipa_openrlhf.settings import Setting, settings_of, updated

TRAINING_MODULES = tuple(dict.fromkeys(("train", *(family.module for family in FAMILIES.values()))))
# Where the config of every other module is.
_CONFIGS = {
    "inspect_data": "pipa_openrlhf.cli.inspect_data:InspectConfig",
    "prepare_alphamath": "pipa_openrlhf.cli.prepare_alphamath:PrepareConfig",
    "sample": "pipa_openrlhf.generate.config:SampleConfig",
    "evaluate": "pipa_openrlhf.generate.config:EvaluateConfig",
    "annotate": "pipa_openrlhf.annotate.config:AnnotateConfig",
    "evaluate_value": "pipa_openrlhf.cli.evaluate_value:EvaluateValueConfig",
    "credit": "pipa_openrlhf.cli.credit:CreditConfig",
    "launch_ray": "pipa_openrlhf.distributed.ray_launch:LaunchConfig",
    "sweep_ray": "pipa_openrlhf.distributed.ray_sweep:SweepConfig",
    "fill_prior": "pipa_openrlhf.cli.fill_prior:FillConfig",
    "report": "pipa_openrlhf.cli.report:ReportConfig",
    "objectives": "pipa_openrlhf.cli.flags:NoConfig",
}
MODULES = (*TRAINING_MODULES, *_CONFIGS)
OBJECTIVE = "objective"


@dataclass(frozen=True)
class NoConfig:
    """Of a command without settings."""


def parse(module: str | type, argv: list[str] | None = None) -> Any:
    """The config that a command line describes.

    ``--config FILE`` is read first, so that a flag on the command line wins.

    Args:
        module: name of an entry point in ``pipa_openrlhf.cli``, such as ``"train_pipa"``, or a class of configs.
        argv: None: of this process.

    Raises:
        UserError: an unknown, abbreviated or malformed flag, or a file that is no config of this module.
    """
    argv = sys.argv[1:] if argv is None else argv
    path = _last_value(argv, "config")
    in_file = dict(flat(read_yaml(path, "--config"))) if path is not None else {}
    return config_of(module, in_file, f"--config {path}", argv)


def config_of(module: str | type, settings: dict[str, Any], where: str, argv: Sequence[str] = ()) -> Any:
    """The config that settings of a file describe, and a command line, which wins.

    Args:
        settings: dotted name to value.
        where: they stand, for messages.

    Raises:
        UserError: as :func:`parse`.
    """
    base = new_config(module, _last_value(argv, OBJECTIVE) or settings.get(OBJECTIVE))
    parser = build_parser(module, base)
    shown = {one.name: one for one in shown_settings(base)}
    words = list(_words(where, settings, shown))
    values = vars(parser.parse_args([*words, *argv]))
    return updated(base, {name: _as_default(values[name], one.default) for name, one in shown.items()})


def _as_default(value: Any, default: Any) -> Any:
    """``value``, or the default where a list of words says the same: a flag that was typed changes nothing by that."""
    return default if isinstance(value, list) and (value == [default] or tuple(value) == default) else value


def new_config(module: str | type, objective: str | None = None) -> Any:
    """A config of ``module`` with every setting at its default.

    Args:
        objective: family in the table of objectives; None: the module's own, or PIPA.

    Raises:
        UserError: there is no such family, or the module trains another one.
    """
    if isinstance(module, type):
        return module()
    if module in _CONFIGS:
        place, _, name = _CONFIGS[module].partition(":")
        return getattr(importlib.import_module(place), name)()
    # `train` is nobody's own: it takes every family, and alone those without an entry point.
    own = next((name for name, family in FAMILIES.items() if family.module == module != "train"), None)
    if objective is not None and objective not in FAMILIES:
        raise UserError(f"--{OBJECTIVE} {objective} is not one of {', '.join(FAMILIES)}")
    if own is not None and objective not in (None, own):
        raise UserError(f"{module} trains {own} and the config file names {objective}: use cli.train")
    return RunConfig(objective=FAMILIES[own or objective or "pipa"]())


def shown_settings(config: Any) -> Iterator[Setting]:
    """The settings of ``config`` that are flags of its command."""
    hidden = config.objective.hidden_groups if isinstance(config, RunConfig) else ()
    return (one for one in settings_of(config) if one.path[0] not in hidden)


def build_parser(module: str | type, config: Any = None) -> argparse.ArgumentParser:
    """Parser of one entry point, with the defaults of ``config`` (None: a new one)."""
    config = new_config(module) if config is None else config
    parser = _Parser(
        prog=module.__module__ if isinstance(module, type) else f"pipa_openrlhf.cli.{module}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=str, default=None, help="YAML file of flags; the command line wins")
    if module == "train":
        parser.add_argument(
            f"--{OBJECTIVE}", type=str, default="pipa", choices=list(FAMILIES), help="family of objectives"
        )
    for one in shown_settings(config):
        _add_flag(parser, one)
    return parser


def _add_flag(parser: argparse.ArgumentParser, one: Setting) -> None:
    options: dict[str, Any] = dict(dest=one.name, default=one.default, help=one.spec.help)
    if one.is_switch:
        parser.add_argument(f"--{one.name}", action="store_true", **options)
        if one.spec.negation:
            parser.add_argument(f"--{one.negation}", action="store_false", **options)
        return
    if one.spec.choices:
        options["choices"] = list(one.spec.choices)
    kind = one.spec.parse or (_true_false if one.type is bool else one.type)
    names = [f"--{name}" for name in (one.spec.former, one.name) if name]
    parser.add_argument(*names, type=kind, nargs=one.spec.nargs, **options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        known = self._option_string_actions
        renamed, unknown = [], []
        for word in message.split():
            name = word.split("=")[0]
            if not name.startswith("--") or name in known:
                continue
            new_name = RENAMED.get(name[2:])
            if f"--{new_name}" in known:
                renamed.append(f"{name} of OpenRLHF before 0.10.2 is called --{new_name} here")
            else:
                unknown.append(f"{name} is unknown")
        if renamed:
            raise UserError("; ".join(renamed + unknown))
        raise UserError(f"{message} (see --help)")


def _true_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _last_value(argv: Sequence[str], name: str) -> str | None:
    # Of a mistake, the whole parser says more.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", default=None)
    try:
        return getattr(parser.parse_known_args(argv)[0], name)
    except (TypeError, argparse.ArgumentError):
        return None


def read_yaml(path: str, flag: str) -> dict[str, Any]:
    """What a YAML file holds.

    Args:
        flag: that named it.

    Raises:
        UserError: no such file, or it does not hold settings.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{flag} {path}{line}: not YAML ({reason}); write `name: value` lines") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: it holds no settings; write `name: value` lines")
    return content


def flat(content: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of nested settings: nesting and dots are the same."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _words(where: str, in_file: dict[str, Any], shown: dict[str, Setting]) -> Iterator[str]:
    """The settings of a file as words of a command line."""
    formerly = {one.spec.former: name for name, one in shown.items() if one.spec.former}
    for written, value in in_file.items():
        name = formerly.get(written, written)
        if name == OBJECTIVE or value is None:
            continue
        if name not in shown:
            raise UserError(f"{where}: {written} is no setting of this command (see --help)")
        one = shown[name]
        if one.is_switch and not isinstance(value, bool):
            raise UserError(f"{where}: {name} is true or false, got {value!r}")
        yield from one.words(value)


# The flag names of OpenRLHF up to 0.9, train_dpo and train_kto (its last KTO trainer), and what they are called here.
RENAMED = {
    "adam_betas": "adam.betas",
    "adam_offload": "ds.adam_offload",
    "apply_chat_template": "data.apply_chat_template",
    "attn_implementation": "ds.attn_implementation",
    "aux_loss_coef": "model.aux_loss_coef",
    "beta": "model.beta",
    "bf16": "ds.param_dtype",
    "chosen_key": "data.chosen_key",
    "ckpt_path": "ckpt.path",
    "dataset": "data.dataset",
    "dataset_probs": "data.dataset_probs",
    "dataset_split": "data.dataset_split",
    "deepcompile": "ds.deepcompile",
    "desirable_loss_weight": "kto.desirable_weight",
    "disable_ds_ckpt": "ckpt.disable_ds",
    "disable_fast_tokenizer": "data.disable_fast_tokenizer",
    "ds_tensor_parallel_size": "ds.tensor_parallel_size",
    "eval_dataset": "eval.dataset",
    "eval_split": "eval.split",
    "eval_steps": "eval.steps",
    "flash_attn": "ds.attn_implementation",
    "full_determinism": "train.full_determinism_enable",
    "grad_accum_dtype": "ds.grad_accum_dtype",
    "gradient_checkpointing": "model.gradient_checkpointing_enable",
    "gradient_checkpointing_use_reentrant": "model.gradient_checkpointing_reentrant",
    "input_key": "data.input_key",
    "input_template": "data.input_template",
    "ipo": "model.ipo_enable",
    "l2": "adam.weight_decay",
    "label_key": "data.label_key",
    "label_smoothing": "model.label_smoothing",
    "learning_rate": "adam.lr",
    "load_checkpoint": "ckpt.load_enable",
    "load_in_4bit": "ds.load_in_4bit",
    "logging_steps": "logger.logging_steps",
    "lora_alpha": "ds.lora.alpha",
    "lora_dropout": "ds.lora.dropout",
    "lora_rank": "ds.lora.rank",
    "max_ckpt_mem": "ckpt.max_mem",
    "max_ckpt_num": "ckpt.max_num",
    "max_epochs": "train.max_epochs",
    "max_len": "data.max_len",
    "max_samples": "data.max_samples",
    "micro_train_batch_size": "train.micro_batch_size",
    "nll_loss_coef": "model.nll_loss_coef",
    "output_key": "data.output_key",
    "overlap_comm": "ds.overlap_comm",
    "packing_samples": "ds.packing_samples",
    "param_dtype": "ds.param_dtype",
    "pretrain": "model.model_name_or_path",
    "prompt_key": "data.prompt_key",
    "ref_offload": "ref.offload",
    "ref_pretrain": "ref.model_name_or_path",
    "rejected_key": "data.rejected_key",
    "ring_attn_size": "ds.ring_attn_size",
    "ring_head_stride": "ds.ring_attn_head_stride",
    "save_hf_ckpt": "ckpt.save_hf",
    "save_path": "ckpt.output_dir",
    "save_steps": "ckpt.save_steps",
    "seed": "train.seed",
    "target_modules": "ds.lora.target_modules",
    "tokenizer_chat_template": "data.tokenizer_chat_template",
    "train_batch_size": "train.batch_size",
    "train_split": "data.dataset_split",
    "undesirable_loss_weight": "kto.undesirable_weight",
    "use_ds_universal_ckpt": "ds.use_universal_ckpt",
    "use_liger_kernel": "ds.use_liger_kernel",
    "use_tensorboard": "logger.tensorboard_dir",
    "use_wandb": "logger.wandb.key",
    "wandb_group": "logger.wandb.group",
    "wandb_org": "logger.wandb.org",
    "wandb_project": "logger.wandb.project",
    "wandb_run_name": "logger.wandb.run_name",
    "zero_stage": "ds.zero_stage",
    "zpg": "ds.zpg",
}
