"""``README.md`` of an export: what the model is, how it was trained, and how it is loaded, served and merged."""

import json
import os
import shlex
from typing import Any

import deepspeed
import peft
import torch
import transformers

from pipa_openrlhf import __version__
from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.model.adapters import is_adapter, vllm_rank
from pipa_openrlhf.model.policy import HEAD_WEIGHTS_FILE
from pipa_openrlhf.settings import flatten, settings_of
from pipa_openrlhf.training.reward_model import VALUE_MODEL


def write_model_card(
    folder: str, config: RunConfig, objective_name: str, last: dict[str, float | None] | None = None
) -> None:
    """Write the model card of the export in ``folder``.

    Args:
        last: metrics of the last step; None leaves their table out.
    """
    base_path = config.model.path
    text = f"""---
base_model: {base_path}
tags: [pipa, preference-alignment, openrlhf]
---
# {objective_name} fine-tuning of {os.path.basename(base_path.rstrip("/"))}

Trained with [PIPA](https://arxiv.org/abs/2502.05773) by pipa-openrlhf {__version__}.

- base model: `{base_path}`
- data: `{config.data.dataset}`
- versions: torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, \
deepspeed {deepspeed.__version__}

Command:

```bash
{command_of(config)}
```

## Use
The commands are for a shell or Python in this folder.

{_adapter_use(folder) if is_adapter(folder) else _WHOLE_USE}{_value_use(folder)}{_metrics(last)}"""
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)


_WHOLE_USE = """These are whole weights: there is no adapter to load with PEFT, and nothing to merge.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

With vLLM:

```bash
vllm serve .
```
"""


def _adapter_use(folder: str) -> str:
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        adapter: dict[str, Any] = json.load(file)
    base, rank = adapter["base_model_name_or_path"], adapter["r"]
    room = vllm_rank(rank)
    serve = f"vLLM takes no adapter of rank {rank}: merge it first, and serve the merged model.\n"
    if room is not None:
        serve = f"""With vLLM, which takes ranks up to 16 unless `--max-lora-rank` says more:

```bash
vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} --lora-modules pipa=.
```

Requests name the model `pipa`.
"""
    return f"""This is a LoRA adapter of rank {rank} to `{base}`. With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), ".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

{serve}
To merge it (`--ckpt.merge_lora` exports merged weights at once):

```python
model.merge_and_unload().save_pretrained("merged")
tokenizer.save_pretrained("merged")
```
"""


def _value_use(folder: str) -> str:
    text = ""
    if os.path.isfile(os.path.join(folder, HEAD_WEIGHTS_FILE)):
        text += f"""
## Value head
`{HEAD_WEIGHTS_FILE}` is g, the probability that what comes next is right:

```python
import torch
from pipa_openrlhf.model.value_model import load_value_model

value_model = load_value_model(".", torch.float32)
print(value_model.values([tokenizer("1+1=2\\n").input_ids]))  # g after the last token
```
"""
    if os.path.isdir(os.path.join(folder, VALUE_MODEL)):
        text += f"""
`{VALUE_MODEL}/` is the merged model with this head as `Qwen2ForRewardModel`. vLLM gives a score for every token;
score i judges token i + 1. It is a logit, whose sigmoid is g: a vLLM that would apply one is told not to.

```python
from vllm import LLM, PoolingParams

llm = LLM("{VALUE_MODEL}", runner="pooling")
[output] = llm.encode("1+1=2\\n", pooling_params=PoolingParams(use_activation=False), pooling_task="token_classify")
print(output.outputs.data.squeeze(-1))
```
"""
    return text


def _metrics(last: dict[str, float | None] | None) -> str:
    if last is None:
        return ""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in last.items() if value is not None)
    return f"""
## Metrics
Of the last optimizer step:

| metric | value |
|---|---|
{rows}
"""


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
