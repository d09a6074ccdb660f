"""Write the trained model in the formats that PEFT, transformers and vLLM read."""

import copy
import json
import os
import re
import shutil
from types import SimpleNamespace

import deepspeed
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf import __version__
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.models.adapters import is_adapter, merge
from pipa_openrlhf.models.config_files import save_model
from pipa_openrlhf.models.loading import load_causal_lm
from pipa_openrlhf.models.policy import Policy
from pipa_openrlhf.models.value_head import save_value_head

MERGED_BASE = "merged_base"
_INTERMEDIATE = re.compile(r"global_step(\d+)_hf")


def export_model(
    folder: str,
    engine,
    strategy: Strategy,
    tokenizer: PreTrainedTokenizerBase,
    base_path: str,
    merge_lora: bool,
    trust_remote_code: bool,
    merged_base: str,
) -> None:
    """Write the adapter (or full weights, or merged weights), the tokenizer and the value head to ``folder``.

    Collective: parameters are gathered one at a time and kept on rank 0 only.

    Args:
        base_path: what the run was started from. Where that is an adapter folder, a new adapter belongs to the
            merged weights.
        merged_base: the folder that gets those, once a run.
    """
    policy: Policy = engine.module
    adapter = isinstance(policy.lm, PeftModel)
    state = _gather(policy, strategy, trainable_only=adapter)
    if strategy.is_rank_0():
        os.makedirs(folder, exist_ok=True)
        prefix = "value_head."
        head = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        lm_state = {name[len("lm.") :]: tensor for name, tensor in state.items() if name.startswith("lm.")}
        if not adapter:
            save_model(policy.lm, folder, base_path, lm_state)
        elif merge_lora:
            _save_merged(folder, policy.lm, lm_state, base_path, trust_remote_code)
        else:
            _save_adapter(folder, policy.lm, lm_state, base_path, merged_base, trust_remote_code)
        tokenizer.save_pretrained(folder)
        if head:
            save_value_head(folder, {name: tensor.float() for name, tensor in head.items()})
    strategy.barrier()


def _gather(policy: Policy, strategy: Strategy, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Parameters, each once, and the buffers that a model keeps, on rank 0."""
    state = {}
    for name, parameter in policy.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if strategy.is_rank_0():
                state[name] = parameter.detach().cpu().clone()
    if strategy.is_rank_0() and not trainable_only:
        # Not the second name of tied weights.
        parameters = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
        kept = policy.state_dict()
        state.update({name: tensor.detach().cpu() for name, tensor in kept.items() if name not in parameters})
    return state


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
            save_model(load_causal_lm(base_path, dtype, "sdpa", trust_remote_code), unfinished, base_path)
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
    save_model(merge(adapted, "--ckpt.merge_lora"), folder, base_path)


def drop_old_exports(folder: str, args: SimpleNamespace) -> None:
    """Delete the oldest ``global_stepN_hf`` in ``folder`` beyond ``--ckpt.max_num``, but no input of the run."""
    inputs = ("model.model_name_or_path", "prior.model_name_or_path", "value.init_from")
    kept = {os.path.realpath(args.flat[name]) for name in inputs if args.flat.get(name)}
    found = sorted((int(match[1]), match[0]) for match in map(_INTERMEDIATE.fullmatch, os.listdir(folder)) if match)
    paths = [path for _, name in found if os.path.realpath(path := os.path.join(folder, name)) not in kept]
    for path in paths[: max(0, len(paths) - args.ckpt.max_num)]:
        shutil.rmtree(path)


def write_args(folder: str, flat: dict, resolved: dict) -> None:
    """``args.json``: every flag by its dotted name, and what the run derived from them under ``resolved.*``."""
    record = {**flat, **{f"resolved.{name}": value for name, value in resolved.items()}}
    if record.get("logger.wandb.key"):
        record["logger.wandb.key"] = "<hidden>"
    with open(os.path.join(folder, "args.json"), "w") as file:
        json.dump(record, file, indent=2, sort_keys=True)


def write_model_card(folder: str, objective_name: str, base_path: str, data: str, command: str, last: dict) -> None:
    """``README.md``: a model card with data, command, versions and the metrics of the last step."""
    import peft
    import transformers

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
