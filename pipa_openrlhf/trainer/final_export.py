"""The end of a run: what could go wrong there is tried at its start, and its weights are safe until it is over."""

import os
import shutil
import tempfile
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.distributed.devices import dtype_of
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models.adapters import is_adapter
from pipa_openrlhf.models.config_files import save_model
from pipa_openrlhf.models.loading import empty_causal_lm
from pipa_openrlhf.models.policy import add_lora
from pipa_openrlhf.trainer.preference_trainer import PreferenceTrainer

_MASTER_AND_MOMENTS = 3 * 4  # bytes of a trained parameter in a checkpoint


def check_export(
    args: SimpleNamespace, tokenizer: PreTrainedTokenizerBase, checkpoint_folder: str, strategy: Strategy
) -> None:
    """Export the run's model without its weights to a temporary folder, and check that the disk has room for them.

    Collective: tried on rank 0, the rank that writes.

    Raises:
        UserError: the export at the end of the run would fail.
    """
    failure = [None]
    if strategy.is_rank_0():
        try:
            _try_export(args, tokenizer, checkpoint_folder)
        except UserError as error:
            failure = [str(error)]
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])


def _try_export(args: SimpleNamespace, tokenizer: PreTrainedTokenizerBase, checkpoint_folder: str) -> None:
    output_dir, start = args.ckpt.output_dir, args.model.model_name_or_path
    try:
        empty = empty_causal_lm(start, dtype_of(args.ds.param_dtype), args.model.trust_remote_code)
    except Exception:  # loading the model says better what is wrong
        return
    base_bytes = sum(one.numel() * one.element_size() for one in empty.parameters())
    lora = args.ds.lora
    lm = add_lora(empty, lora.rank, lora.alpha, lora.target_modules, lora.dropout) if lora.rank else empty
    exports_adapter = isinstance(lm, PeftModel) and not args.ckpt.merge_lora
    trained = [one for one in lm.parameters() if one.requires_grad]
    try:
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export_trial_") as trial:
            if exports_adapter:
                lm.save_pretrained(trial, state_dict={}, save_embedding_layers=False)
            else:
                save_model(empty if lm is empty else lm.unload(), trial, start, {})
            tokenizer.save_pretrained(trial)
    except Exception as error:  # of any library that writes a file of the export
        raise UserError(
            f"the model could not be exported to {output_dir} at the end of the run: {_one_line(error)}"
        ) from error
    needed = base_bytes
    if exports_adapter:
        needed = sum(one.numel() * one.element_size() for one in trained) + base_bytes * is_adapter(start)
    checkpoint = sum(one.numel() for one in trained) * _MASTER_AND_MOMENTS if _writes_checkpoint(args) else 0
    _check_space([(output_dir, needed), (checkpoint_folder, checkpoint)])


def export_finished(trainer: PreferenceTrainer) -> None:
    """Export to ``--ckpt.output_dir``, with a checkpoint of the last step on disk until that is done.

    Raises:
        UserError: the export failed; says how to go on.
    """
    args = trainer.args
    trainer.update_check.report()
    checkpoint = os.path.join(trainer.checkpoint_folder, f"global_step{trainer.position.step}")
    is_safe = _writes_checkpoint(args)
    if is_safe and not os.path.isdir(checkpoint):
        trainer.save_checkpoint(rotate=False)
    try:
        trainer.export(args.ckpt.output_dir)
    except Exception as error:
        rescue = "nothing is kept, since --ckpt.disable_ds or the optimizer leaves no checkpoint"
        if is_safe:
            rescue = f"the weights are in {checkpoint}: put it right and give the same command with --ckpt.load_enable"
        raise UserError(f"the export to {args.ckpt.output_dir} failed ({_one_line(error)}); {rescue}") from error
    asked_for = args.ckpt.save_steps != -1 and trainer.position.step % args.ckpt.save_steps == 0
    if is_safe and not asked_for and trainer.strategy.is_rank_0():
        shutil.rmtree(checkpoint)
        if not os.listdir(trainer.checkpoint_folder):
            os.rmdir(trainer.checkpoint_folder)
    trainer.strategy.barrier()


def _writes_checkpoint(args: SimpleNamespace) -> bool:
    return not args.ckpt.disable_ds and args.optim != "muon"


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


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
