"""Answers by vLLM, which keeps its batches full and has kernels of its own."""

import os
from collections.abc import Iterator
from typing import Any, cast

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.generate.config import WriterConfig
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings, end_tokens, seed_of, to_answer
from pipa_openrlhf.model.adapters import adapter_base, is_adapter, vllm_rank
from pipa_openrlhf.model.loading import only_from_disk

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
    ids = cast(list[list[int]], encode(prompts, tokenizer))  # prompts that have none are refused before
    length = max(map(len, ids)) + settings.max_new_tokens
    engine, adapter, published = _load(config, None if settings.stop is None else tokenizer.name_or_path, length)
    ends = end_tokens(published, tokenizer)

    def answer(prompt: list[int], one: Any) -> Answer:
        return to_answer(tokenizer, prompt, list(one.token_ids), one.finish_reason == "stop", ends, settings.stop)

    for batch in batches:
        asked: list[Any] = [{"prompt_token_ids": ids[index]} for index in batch]
        drawn = [_drawing(settings, ends, prompts[index], index) for index in batch]
        outputs = engine.generate(asked, drawn, lora_request=adapter, use_tqdm=False)
        answers = [[answer(ids[index], one) for one in output.outputs] for index, output in zip(batch, outputs)]
        yield batch, [of_prompt * (settings.num_samples // len(of_prompt)) for of_prompt in answers]


def _drawing(settings: SamplingSettings, ends: list[int], prompt: str, index: int) -> Any:
    """Of one prompt; by its ``index``, the same prompt twice gets answers of its own each time.

    Greedily one answer is written, which vLLM insists on.
    """
    from vllm import SamplingParams

    return SamplingParams(
        n=settings.num_samples if settings.temperature > 0 else 1,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        stop=settings.stop,
        stop_token_ids=ends,
        seed=seed_of(settings.seed, [prompt, str(index)]),
        detokenize=settings.stop is not None,
        skip_special_tokens=False,
    )


def _load(config: WriterConfig, tokenizer: str | None, length: int) -> tuple[Any, Any, GenerationConfig]:
    """The engine with room for ``length`` tokens, the adapter to ask for, and what the model was published with.

    ``tokenizer`` is only needed to find a text that ends answers; what else goes in and out are tokens.
    """
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
    try:
        if only_from_disk(path):
            tokenizer = tokenizer and snapshot_download(tokenizer, revision=revision, local_files_only=True)
            path = snapshot_download(path, revision=revision, local_files_only=True)
        engine = LLM(
            path,
            revision=revision,
            tokenizer=tokenizer,
            skip_tokenizer_init=tokenizer is None,
            dtype=cast(Any, _DTYPES[config.ds.param_dtype]),
            trust_remote_code=config.model.trust_remote_code,
            tensor_parallel_size=config.vllm.tensor_parallel_size,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            max_model_len=length,
            generation_config="vllm",  # not how the model was published to be drawn from
            seed=config.train.seed,
            **lora,
        )
        if adapter is not None:
            engine.llm_engine.add_lora(adapter)  # what vLLM refuses of it, it refuses here
        return engine, adapter, _published(path, revision, config.model.trust_remote_code)
    except Exception as error:  # vLLM's own are of no common kind, and those of its processes are plain Exceptions
        raise UserError(
            f"vLLM cannot load {config.model.path} for prompts and answers of up to {length} tokens: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Pydantic says only how many there are in its first line, and of which field in the next."""
    first, *others = str(error).splitlines() or [""]
    if "validation error" in first and others:
        return " ".join(line.strip() for line in others[:2])
    return first_line(error)


def _lora_options(path: str) -> dict[str, Any]:
    """Raises UserError for an adapter that vLLM would refuse, or take for another."""
    config, (base, _) = PeftConfig.from_pretrained(path), adapter_base(path)
    weights = os.path.join(path, "adapter_model.safetensors")
    others: list[str] = []
    if os.path.isfile(weights):
        with safe_open(weights, framework="pt") as tensors:
            others = [key for key in tensors.keys() if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if is_adapter(base):
        reason = f"its base {base} is an adapter too"
    elif not isinstance(config, LoraConfig):
        reason = f"it is of the type {config.peft_type}"
    elif others:
        reason = f"it has more than low-rank weights, {others[0]}"
    elif config.rank_pattern or config.alpha_pattern or getattr(config, "alora_invocation_tokens", None):
        reason = "its layers have ranks or scales of their own, or it is for some tokens only"
    elif config.layer_replication or config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        reason = f"PEFT changes the base when it loads it (init_lora_weights {config.init_lora_weights})"
    elif vllm_rank(config.r) is None:
        reason = f"its rank is {config.r}"
    else:
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(config.r)}
    raise UserError(f"vLLM does not take the adapter {path}: {reason}; merge it, or remove --vllm.enable")


def _published(path: str, revision: str | None, trust_remote_code: bool) -> GenerationConfig:
    options: dict[str, Any] = {"revision": revision}
    try:
        return GenerationConfig.from_pretrained(path, **options)
    except OSError:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        return GenerationConfig.from_model_config(config)
