"""Answers by vLLM, which keeps its batches full and has kernels of its own."""

import os
from collections.abc import Iterator
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.generate.config import WriterConfig
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings, end_tokens, seed_of, to_answer
from pipa_openrlhf.model.loading import adapter_base, is_adapter, only_from_disk, vllm_rank

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def vllm_batches(
    config: WriterConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batches: list[list[int]],
    settings: SamplingSettings,
) -> Iterator[tuple[list[int], list[list[Answer]]]]:
    """Each batch's indices with ``num_samples`` answers to each of its prompts.

    Prompts, temperature, and the tokens and the text that end an answer are those of ``sample_batches``. Chance is
    not: each prompt has a seed of its own.

    Raises:
        UserError: vLLM cannot load the model, or has no room for the longest prompt and its answer.
    """
    ids = [one or [] for one in encode(prompts, tokenizer)]
    engine, adapter, published = _load(config, max(map(len, ids)) + settings.max_new_tokens)
    ends = end_tokens(published, tokenizer)

    def answer(prompt: list[int], one: Any) -> Answer:
        return to_answer(tokenizer, prompt, list(one.token_ids), one.finish_reason == "stop", ends, settings.stop)

    for batch in batches:
        asked: list[Any] = [{"prompt_token_ids": ids[index]} for index in batch]
        drawn = [_drawing(settings, ends, prompts[index], index) for index in batch]
        outputs = engine.generate(asked, drawn, lora_request=adapter, use_tqdm=False)
        yield batch, [[answer(ids[index], one) for one in output.outputs] for index, output in zip(batch, outputs)]


def _drawing(settings: SamplingSettings, ends: list[int], prompt: str, index: int) -> Any:
    """Of one prompt; by its ``index``, the same prompt twice gets answers of its own each time."""
    from vllm import SamplingParams

    return SamplingParams(
        n=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        stop=settings.stop,
        stop_token_ids=ends,
        seed=seed_of(settings.seed, [prompt, str(index)]),
        skip_special_tokens=False,
    )


def _load(config: WriterConfig, length: int) -> tuple[Any, Any, GenerationConfig]:
    """The engine with room for ``length`` tokens, the adapter to ask for, and what the model was published with."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # it writes many lines as it starts
    # A scheduler in a process of its own outlives a run that is killed, and keeps the GPU's memory.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    path, revision = config.model.path, None
    adapter, lora = None, {}
    if is_adapter(path):
        adapter, lora = LoRARequest("policy", 1, os.path.abspath(path)), _lora_options(path)
        path, revision = adapter_base(path)
    published = _published(path, revision, config.model.trust_remote_code)
    try:
        engine = LLM(
            path,
            revision=revision,
            dtype=cast(Any, _DTYPES[config.ds.param_dtype]),
            trust_remote_code=config.model.trust_remote_code,
            tensor_parallel_size=config.vllm.tensor_parallel_size,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            max_model_len=length,
            generation_config="vllm",  # not how the model was published to be drawn from
            seed=config.train.seed,
            **lora,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"vLLM cannot load {config.model.path}: {first_line(error)}") from error
    return engine, adapter, published


def _lora_options(path: str) -> dict[str, Any]:
    """Raises UserError for an adapter that vLLM would refuse, or take for another."""
    config, (base, _) = PeftConfig.from_pretrained(path), adapter_base(path)
    reason, room = "", None
    if is_adapter(base):
        reason = f"its base {base} is an adapter too"
    elif not isinstance(config, LoraConfig):
        reason = f"it is of the type {config.peft_type}"
    elif config.modules_to_save or config.trainable_token_indices:
        reason = "it has whole layers or tokens that were trained"
    elif config.use_dora:
        reason = "it is a DoRA adapter"
    else:
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        room = vllm_rank(rank)
        reason = "" if room is not None else f"its rank is {rank}"
    if reason:
        raise UserError(f"vLLM does not take the adapter {path}: {reason}; merge it, or remove --vllm.enable")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def _published(path: str, revision: str | None, trust_remote_code: bool) -> GenerationConfig:
    options: dict[str, Any] = {"revision": revision, "local_files_only": only_from_disk(path)}
    try:
        return GenerationConfig.from_pretrained(path, **options)
    except OSError:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        return GenerationConfig.from_model_config(config)
