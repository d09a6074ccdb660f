"""Write the trained model in the formats that PEFT, transformers and vLLM read."""

import copy
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from pipa_openrlhf import __version__
from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.strategy import Strategy, dtype_of
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.loading import (
    base_model,
    empty_causal_lm,
    is_adapter,
    load_causal_lm,
    merge,
    only_from_disk,
    root_model,
)
from pipa_openrlhf.model.policy import Policy, add_lora, save_value_head
from pipa_openrlhf.settings import flatten, settings_of, to_yaml, updated
from pipa_openrlhf.training.checkpoint import delete_checkpoint
from pipa_openrlhf.training.sharded_weights import (
    has_adapted_embeddings,
    merged_one_by_one,
    one_by_one,
    save_sharded,
)

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import PreferenceTrainer

log = logging.getLogger(__name__)

MERGED_BASE = "merged_base"
_INTERMEDIATE = re.compile(r"global_step(\d+)_hf")

_CONFIG, _GENERATION = "config.json", "generation_config.json"
# What merging an adapter may have changed.
_MAY_CHANGE = ("vocab_size", "tie_word_embeddings")


def export_model(
    folder: str,
    config: RunConfig,
    engine,
    strategy: Strategy,
    tokenizer: PreTrainedTokenizerBase,
    merged_base: str,
) -> None:
    """Write the adapter (or full weights, or merged weights), the tokenizer and the value head to ``folder``.

    Collective: parameters are gathered one at a time; of full weights one shard is kept on rank 0.

    Args:
        merged_base: where the run started from an adapter folder, a new adapter belongs to the merged weights; this
            folder gets those, once a run.
    """
    policy: Policy = engine.module
    base_path, trust_remote_code = config.model.path, config.model.trust_remote_code
    if strategy.is_rank_0():
        os.makedirs(folder, exist_ok=True)
    lm: PreTrainedModel | PeftModel = policy.lm
    if not isinstance(lm, PeftModel):
        _save_whole(folder, lm, base_path, one_by_one(lm.named_parameters(), strategy))
    elif config.ckpt.merge_lora and config.ds.zero_stage == 3 and not has_adapted_embeddings(lm):
        # A model that no device holds alone; below ZeRO-3 there is a host's memory for it.
        base = base_model(lm)
        _save_whole(folder, base, base_path, merged_one_by_one(base, strategy))
    else:
        lm_state = _gather(lm, strategy)
        if strategy.is_rank_0():
            if config.ckpt.merge_lora:
                _save_merged(folder, lm, lm_state, base_path, trust_remote_code)
            else:
                _save_adapter(folder, lm, lm_state, base_path, merged_base, trust_remote_code)
    head = {} if policy.value_head is None else _gather(policy.value_head, strategy)
    if strategy.is_rank_0():
        tokenizer.save_pretrained(folder)
        if head:
            save_value_head(folder, {name: tensor.float() for name, tensor in head.items()})
    strategy.barrier()


def _gather(module: torch.nn.Module, strategy: Strategy) -> dict[str, torch.Tensor]:
    """Trained parameters, each once, on rank 0."""
    trained = ((name, one) for name, one in module.named_parameters() if one.requires_grad)
    return {name: tensor for name, tensor in one_by_one(trained, strategy) if tensor is not None}


def _save_whole(
    folder: str, model: PreTrainedModel, base_path: str, weights: Iterable[tuple[str, torch.Tensor | None]]
) -> None:
    """``weights`` as rank 0 gets them, None elsewhere. Collective."""
    save_sharded(folder, model, weights, lambda part, some: _save_model(model, part, base_path, some))


def _save_adapter(
    folder: str,
    model: PeftModel,
    lm_state: dict[str, torch.Tensor],
    base_path: str,
    merged_base: str,
    trust_remote_code: bool,
) -> None:
    base = base_path
    if is_adapter(base_path):
        base = merged_base
        if not os.path.isdir(merged_base):
            # Under its own name only when it is whole: every export of the run belongs to it.
            unfinished = merged_base + ".unfinished"
            dtype = next(iter(lm_state.values())).dtype
            _save_model(load_causal_lm(base_path, dtype, "sdpa", trust_remote_code), unfinished, base_path)
            os.rename(unfinished, merged_base)
    model.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    model.save_pretrained(folder, state_dict=get_peft_model_state_dict(model, lm_state), save_embedding_layers=False)


def _save_merged(
    folder: str, model: PeftModel, lm_state: dict[str, torch.Tensor], base_path: str, trust_remote_code: bool
) -> None:
    dtype = next(iter(lm_state.values())).dtype
    base = load_causal_lm(base_path, dtype, "sdpa", trust_remote_code)
    adapted = get_peft_model(base, copy.deepcopy(model.peft_config["default"]), autocast_adapter_dtype=False)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model, lm_state))
    _save_model(merge(adapted, "--ckpt.merge_lora"), folder, base_path)


def drop_old_exports(config: RunConfig) -> None:
    """Delete the oldest ``global_stepN_hf`` of a run beyond ``--ckpt.max_num``, but no input of the run."""
    inputs = ("model.model_name_or_path", "prior.model_name_or_path", "value.init_from")
    folder, values = config.ckpt.folder, flatten(config)
    kept = {os.path.realpath(values[name]) for name in inputs if values.get(name)}
    found = sorted((int(match[1]), match[0]) for match in map(_INTERMEDIATE.fullmatch, os.listdir(folder)) if match)
    paths = [path for _, name in found if os.path.realpath(path := os.path.join(folder, name)) not in kept]
    for path in paths[: max(0, len(paths) - config.ckpt.max_num)]:
        shutil.rmtree(path)


def write_config(config: RunConfig, resolved: dict) -> None:
    """``config.yaml``, which runs the same again, and ``args.json``: every flag by its dotted name, and what the run
    derived from them under ``resolved.*``."""
    folder, secret = config.ckpt.output_dir, "logger.wandb.key"
    values = flatten(config)
    record = {**values, **{f"resolved.{name}": value for name, value in resolved.items()}}
    if record[secret]:
        record[secret] = "<hidden>"
    with open(os.path.join(folder, "args.json"), "w") as file:
        json.dump(record, file, indent=2, sort_keys=True)
    with open(os.path.join(folder, "config.yaml"), "w", encoding="utf-8") as file:
        file.write(to_yaml(updated(config, {secret: None, "local_rank": -1})))


def write_model_card(config: RunConfig, objective_name: str, last: dict) -> None:
    """``README.md``: a model card with data, command, versions and the metrics of the last step."""
    import peft
    import transformers

    folder, base_path, data = config.ckpt.output_dir, config.model.path, config.data.dataset
    command = command_of(config)
    metrics = "\n".join(f"| {name} | {value:.6g} |" for name, value in last.items() if value is not None)
    text = f"""---
base_model: {base_path}
tags: [pipa, preference-alignment, openrlhf]
---
# {objective_name} fine-tuning of {os.path.basename(base_path.rstrip("/"))}

Trained with [PIPA](https://arxiv.org/abs/2502.05773) by pipa-openrlhf {__version__}.

- base model: `{base_path}`
- data: `{data}`
- versions: torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, \
deepspeed {deepspeed.__version__}

Command:

```bash
{command}
```

Metrics of the last optimizer step:

| metric | value |
|---|---|
{metrics}
"""
    with open(os.path.join(folder, "README.md"), "w") as file:
        file.write(text)


_MASTER_AND_MOMENTS = 3 * 4  # bytes of a trained parameter in a checkpoint


def check_export(config: RunConfig, tokenizer: PreTrainedTokenizerBase, strategy: Strategy) -> None:
    """Export the run's model without its weights to a temporary folder, and check that the disk has room for them.

    Collective: tried on rank 0, the rank that writes.

    Raises:
        UserError: the export at the end of the run would fail.
    """
    failure: list[str | None] = [None]
    if strategy.is_rank_0():
        try:
            _try_export(config, tokenizer)
        except UserError as error:
            failure = [str(error)]
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])


def _try_export(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    output_dir, start = config.ckpt.output_dir, config.model.path
    try:
        empty = empty_causal_lm(start, dtype_of(config.ds.param_dtype), config.model.trust_remote_code)
    except Exception:  # loading the model says better what is wrong
        return
    base_bytes = sum(one.numel() * one.element_size() for one in empty.parameters())
    lora = config.ds.lora
    lm: PreTrainedModel | PeftModel = empty
    if lora.rank:
        lm = add_lora(empty, lora.rank, lora.alpha, lora.target_modules, lora.dropout)
    exports_adapter = isinstance(lm, PeftModel) and not config.ckpt.merge_lora
    trained = [one for one in lm.parameters() if one.requires_grad]
    try:
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export_trial_") as trial:
            if exports_adapter:
                lm.save_pretrained(trial, state_dict={}, save_embedding_layers=False)
            else:
                _save_model(lm.unload() if isinstance(lm, PeftModel) else lm, trial, start, {})
            tokenizer.save_pretrained(trial)
    except Exception as error:  # of any library that writes a file of the export
        raise UserError(
            f"the model could not be exported to {output_dir} at the end of the run: {first_line(error)}"
        ) from error
    needed = base_bytes
    if exports_adapter:
        needed = sum(one.numel() * one.element_size() for one in trained) + base_bytes * is_adapter(start)
    checkpoint = sum(one.numel() for one in trained) * _MASTER_AND_MOMENTS if _writes_checkpoint(config) else 0
    _check_space([(output_dir, needed), (config.ckpt.folder, checkpoint)])


def export_finished(trainer: "PreferenceTrainer") -> None:
    """Export to ``--ckpt.output_dir``, with a checkpoint of the last step on disk until that is done.

    Raises:
        UserError: the export failed; says how to go on.
    """
    config = trainer.config
    checkpoint = os.path.join(config.ckpt.folder, f"global_step{trainer.position.step}")
    is_safe = _writes_checkpoint(config)
    rescue = "nothing is kept, since --ckpt.disable_ds or the optimizer leaves no checkpoint"
    if is_safe and not trainer.strategy.from_rank_0(lambda: os.path.isdir(checkpoint)):
        try:
            trainer.save_checkpoint(rotate=False)
        except UserError as error:
            # The weights are still in memory: what was trained is exported all the same.
            log.warning(f"No checkpoint of the last step: {error}")
            is_safe, rescue = False, "there is no checkpoint of the last step, see above"
    try:
        trainer.export_to(config.ckpt.output_dir)
    except Exception as error:
        if is_safe:
            rescue = f"the weights are in {checkpoint}: put it right and give the same command with --ckpt.load_enable"
        raise UserError(f"the export to {config.ckpt.output_dir} failed ({first_line(error)}); {rescue}") from error


def drop_rescue(config: RunConfig, step: int) -> None:
    """On rank 0, once the run is marked finished: delete its last checkpoint where it was not asked for."""
    asked_for = config.ckpt.save_steps != -1 and step % config.ckpt.save_steps == 0
    checkpoint = os.path.join(config.ckpt.folder, f"global_step{step}")
    if not asked_for and os.path.isdir(checkpoint):
        delete_checkpoint(checkpoint)
        if not os.listdir(config.ckpt.folder):
            os.rmdir(config.ckpt.folder)


def export_step(trainer: "PreferenceTrainer") -> None:
    """Export to ``global_stepN_hf`` beside the checkpoint of this step, whole or not at all; one that is there stays.

    Collective.
    """
    folder = os.path.join(trainer.config.ckpt.folder, f"global_step{trainer.position.step}_hf")
    if trainer.strategy.from_rank_0(lambda: os.path.isdir(folder)):
        return
    trainer.export_to(folder, folder + ".unfinished")
    if trainer.strategy.is_rank_0():
        os.rename(folder + ".unfinished", folder)
        drop_old_exports(trainer.config)


def _writes_checkpoint(config: RunConfig) -> bool:
    return not config.ckpt.disable_ds and config.optim != "muon"


def _check_space(needs: list[tuple[str, int]]) -> None:
    by_disk: dict[int, list[tuple[str, int]]] = {}
    for folder, size in needs:
        while not os.path.isdir(folder):
            folder = os.path.dirname(os.path.abspath(folder))
        by_disk.setdefault(os.stat(folder).st_dev, []).append((folder, size))
    for entries in by_disk.values():
        folder, needed = entries[0][0], sum(size for _, size in entries)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{folder} has {free / 1e9:.2f} GB free, and the export and the checkpoint before it need "
                f"{needed / 1e9:.2f} GB: make room, or give --ckpt.output_dir or --ckpt.path elsewhere"
            )


def command_of(config: RunConfig) -> str:
    """The command of a run: what differs from the defaults, without the wandb key and the launcher's rank."""
    values, default = flatten(config), flatten(RunConfig(objective=type(config.objective)()))
    module = config.objective.module
    words = ["--objective", config.objective.flag_group] if module == "train" else []
    for one in settings_of(config):
        value = values[one.name]
        if value != default[one.name] and one.name not in ("local_rank", "logger.wandb.run_name"):
            words += one.words("<hidden>" if one.name == "logger.wandb.key" else value)
    return f"python -m pipa_openrlhf.cli.{module} {shlex.join(words)}"


def _save_model(
    model: PreTrainedModel, folder: str, read_from: str, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write ``model`` to ``folder``.

    Args:
        read_from: the hub name, model folder or adapter folder that it was loaded from.
        state: its weights, where they are not in ``model`` itself.
    """
    generation: Any = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = generation
    written = os.path.join(folder, _GENERATION)
    original = _original(read_from, _GENERATION)
    if original is not None:
        shutil.copyfile(original, written)
    elif os.path.isfile(written):
        os.remove(written)  # without one, generation reads the model's config
    original = _original(read_from, _CONFIG)
    if original is not None and not model.is_remote_code():
        _restore_config(model, os.path.join(folder, _CONFIG), original)


def _original(path: str, name: str) -> str | None:
    """The file ``name`` of the model below all adapters in ``path``; None where it has none."""
    root, revision = root_model(path)
    return cached_file(
        root,
        name,
        revision=revision,
        local_files_only=only_from_disk(root),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _restore_config(model: PreTrainedModel, path: str, original: str) -> None:
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    with open(original, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("model_type") != written["model_type"]:
        return  # the language model of a larger one was loaded and saved alone
    config["architectures"] = written["architectures"]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = written["dtype"]
    if "quantization_config" not in written:
        config.pop("quantization_config", None)
    read = type(model.config).from_dict(config)
    sections = [(config, model.config, read)]
    if isinstance(config.get("text_config"), dict):
        sections.append((config["text_config"], model.config.get_text_config(), read.get_text_config()))
    for section, now, then in sections:
        for name in _MAY_CHANGE:
            if getattr(now, name, None) != getattr(then, name, None):
                section[name] = getattr(now, name)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
