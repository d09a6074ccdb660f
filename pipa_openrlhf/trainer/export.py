"""Write the trained model in the formats that PEFT, transformers and vLLM read."""

import json
import os

import deepspeed
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf import __version__
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.models.loading import is_adapter, load_causal_lm
from pipa_openrlhf.models.policy import Policy
from pipa_openrlhf.models.value_head import save_value_head

MERGED_BASE = "merged_base"


def export_model(
    folder: str,
    engine,
    strategy: Strategy,
    tokenizer: PreTrainedTokenizerBase,
    base_path: str,
    merge_lora: bool,
    trust_remote_code: bool,
) -> None:
    """Write the adapter (or full weights, or merged weights), the tokenizer and the value head to ``folder``.

    Collective: parameters are gathered one at a time and kept on rank 0 only.

    Args:
        base_path: what the run was started from. Where that is an adapter folder, the new adapter belongs to the
            merged weights, which are then written to ``folder/merged_base``.
    """
    policy: Policy = engine.module
    adapter = isinstance(policy.lm, PeftModel)
    state = _gather(policy, strategy, trainable_only=adapter)
    if strategy.is_rank_0():
        os.makedirs(folder, exist_ok=True)
        prefix = "value_head."
        head = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        lm_state = {name[len("lm.") :]: tensor for name, tensor in state.items() if name.startswith("lm.")}
        if adapter:
            _save_adapter(folder, policy.lm, lm_state, base_path, merge_lora, trust_remote_code)
        else:
            policy.lm.save_pretrained(folder, state_dict=lm_state)
        tokenizer.save_pretrained(folder)
        if head:
            save_value_head(folder, {name: tensor.float() for name, tensor in head.items()})
    strategy.barrier()


def _gather(policy: Policy, strategy: Strategy, trainable_only: bool) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in policy.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if strategy.is_rank_0():
                state[name] = parameter.detach().cpu().clone()
    if strategy.is_rank_0() and not trainable_only:
        state.update(
            {
                name: buffer.detach().cpu()
                for name, buffer in policy.lm.state_dict(prefix="lm.").items()
                if name not in state and buffer.numel() and not hasattr(buffer, "ds_id")
            }
        )
    return state


def _save_adapter(
    folder: str,
    model: PeftModel,
    lm_state: dict[str, torch.Tensor],
    base_path: str,
    merge_lora: bool,
    trust_remote_code: bool,
) -> None:
    dtype = next(iter(lm_state.values())).dtype
    config = model.peft_config["default"]
    if is_adapter(base_path):
        base_folder = os.path.join(folder, MERGED_BASE)
        base = load_causal_lm(base_path, dtype, "sdpa", trust_remote_code)
        base.save_pretrained(base_folder)
        del base
    else:
        base_folder = base_path
    config.base_model_name_or_path = os.path.abspath(base_folder) if os.path.isdir(base_folder) else base_folder
    model.save_pretrained(folder, state_dict=get_peft_model_state_dict(model, lm_state), save_embedding_layers=False)
    if merge_lora:
        load_causal_lm(folder, dtype, "sdpa", trust_remote_code).save_pretrained(folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.remove(os.path.join(folder, name))


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
