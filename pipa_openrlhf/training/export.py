"""Write the trained model in the formats that PEFT, transformers and vLLM read."""

import copy
import json
import logging
import os
import re
import shutil
import tempfile
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.strategy import Strategy, dtype_of
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import base_model, is_adapter, merge
from pipa_openrlhf.model.loading import empty_causal_lm, load_causal_lm
from pipa_openrlhf.model.policy import Policy, add_lora, save_value_head
from pipa_openrlhf.settings import flatten, to_yaml, updated
from pipa_openrlhf.training.checkpoint import delete_checkpoint
from pipa_openrlhf.training.model_card import write_model_card
from pipa_openrlhf.training.reward_model import VALUE_MODEL, check_reward_model, reward_model_bytes, save_reward_model
from pipa_openrlhf.training.save_model import save_model
from pipa_openrlhf.training.sharded_weights import (
    WholeModel,
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


def export_model(
    folder: str,
    config: RunConfig,
    engine,
    strategy: Strategy,
    tokenizer: PreTrainedTokenizerBase,
    merged_base: str,
) -> None:
    """Write the adapter (or full weights, or merged weights), the tokenizer and the value head to ``folder``; with
    ``--ckpt.value_model`` the value model too.

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
    head = {} if policy.value_head is None else _gather(policy.value_head, strategy)
    whole = None
    if config.ckpt.merge_lora or config.ckpt.value_model or not isinstance(lm, PeftModel):
        whole = _whole_model(lm, config, strategy)
    if whole is not None and (config.ckpt.merge_lora or not isinstance(lm, PeftModel)):
        write = partial(save_model, whole.model, read_from=base_path)
        save_sharded(folder, whole.model, whole.weights(), write)
    elif isinstance(lm, PeftModel):
        lm_state = _gather(lm, strategy)
        if strategy.is_rank_0():
            _save_adapter(folder, lm, lm_state, base_path, merged_base, trust_remote_code)
    if whole is not None and config.ckpt.value_model:
        save_reward_model(os.path.join(folder, VALUE_MODEL), whole, head, base_path, tokenizer, strategy)
    if strategy.is_rank_0():
        tokenizer.save_pretrained(folder)
        if head:
            save_value_head(folder, {name: tensor.float() for name, tensor in head.items()})
    strategy.barrier()


def _whole_model(lm: PreTrainedModel | PeftModel, config: RunConfig, strategy: Strategy) -> WholeModel:
    """The trained language model with its adapter merged. Collective."""
    if not isinstance(lm, PeftModel):
        return WholeModel(lm, lambda: one_by_one(lm.named_parameters(), strategy))
    base = base_model(lm)
    if config.ds.zero_stage == 3 and not has_adapted_embeddings(lm):
        # A model that no device holds alone; below ZeRO-3 there is a host's memory for it.
        return WholeModel(base, lambda: merged_one_by_one(base, strategy))
    lm_state = _gather(lm, strategy)
    if not strategy.is_rank_0():
        return WholeModel(base, lambda: ())
    merged = _merged(lm, lm_state, config.model.path, config.model.trust_remote_code)
    return WholeModel(merged, lambda: ((name, one.detach()) for name, one in merged.named_parameters()))


def _gather(module: torch.nn.Module, strategy: Strategy) -> dict[str, torch.Tensor]:
    """Trained parameters, each once, on rank 0."""
    trained = ((name, one) for name, one in module.named_parameters() if one.requires_grad)
    return {name: tensor for name, tensor in one_by_one(trained, strategy) if tensor is not None}


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
            save_model(load_causal_lm(base_path, dtype, "sdpa", trust_remote_code), unfinished, read_from=base_path)
            os.rename(unfinished, merged_base)
    model.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    model.save_pretrained(folder, state_dict=get_peft_model_state_dict(model, lm_state), save_embedding_layers=False)


def _merged(
    model: PeftModel, lm_state: dict[str, torch.Tensor], base_path: str, trust_remote_code: bool
) -> PreTrainedModel:
    dtype = next(iter(lm_state.values())).dtype
    base = load_causal_lm(base_path, dtype, "sdpa", trust_remote_code)
    adapted = get_peft_model(base, copy.deepcopy(model.peft_config["default"]), autocast_adapter_dtype=False)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model, lm_state))
    return merge(adapted, "the export: --ckpt.merge_lora or --ckpt.value_model")


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
    if config.ckpt.value_model:
        check_reward_model(config, empty.config)
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
                save_model(lm.unload() if isinstance(lm, PeftModel) else lm, trial, {}, read_from=start)
            tokenizer.save_pretrained(trial)
    except Exception as error:  # of any library that writes a file of the export
        raise UserError(
            f"the model could not be exported to {output_dir} at the end of the run: {first_line(error)}"
        ) from error
    needed = base_bytes
    if exports_adapter:
        needed = sum(one.numel() * one.element_size() for one in trained) + base_bytes * is_adapter(start)
    if config.ckpt.value_model:
        needed += reward_model_bytes(empty)
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
        write_model_card(folder + ".unfinished", trainer.config, trainer.objective.name)
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
