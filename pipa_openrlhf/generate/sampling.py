"""From prompts to answers: a model continues them in batches of similar length.

A batch has a seed of its own, made from the run's seed and the prompts in it. A run that was stopped and continued
therefore draws the same answers as one that was not.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from pipa_openrlhf.data.render import use_chat_template
from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.distributed.strategy import device, dtype_of, slow_dtype_hint
from pipa_openrlhf.evaluate.grading import grader_name
from pipa_openrlhf.generate.config import GenerateConfig, WriterConfig
from pipa_openrlhf.generate.drawing import DrawToken
from pipa_openrlhf.generate.problems import Problem, RowFile, digest_of, read_problems
from pipa_openrlhf.generate.prompts import write_prompts
from pipa_openrlhf.model.loading import (
    load_causal_lm,
    load_tokenizer,
    resolve_attention,
    use_modelscope,
)
from pipa_openrlhf.model.output_head import only_accepted
from pipa_openrlhf.prior.cache import weights_id
from pipa_openrlhf.remembered import user_cache_dir

log = logging.getLogger(__name__)

# Tokens. Another pass through the model reads all of its weights, which fewer tokens do not pay for.
_LEAST_SHARED = 16


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn.

    ``temperature`` 0 is greedy decoding; ``batch_size`` counts answers; an answer ends before the text ``stop``.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 96
    seed: int = 42
    stop: str | None = None

    @property
    def rows_per_prompt(self) -> int:
        """Of a batch."""
        return self.num_samples


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        finished: the model ended it; otherwise it was stopped for length.
        num_tokens: drawn, its end included.
        token_ids: of its text, without its end; empty where a search found it.
        value: of the answer, where something judged it.
    """

    text: str
    finished: bool
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    value: float | None = None


def plan_batches(prompts: list[str], settings: SamplingSettings) -> list[list[int]]:
    """Indices of the prompts of each batch, the longest prompts first: running out of memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    size = max(1, settings.batch_size // settings.rows_per_prompt)
    return [order[start : start + size] for start in range(0, len(order), size)]


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batches: list[list[int]],
    settings: SamplingSettings,
) -> Iterator[tuple[list[int], list[list[Answer]]]]:
    """Each batch's indices with ``num_samples`` answers to each of its prompts.

    The model's own generation settings are replaced: generate() would fill every gap with them, a repetition penalty
    for example.
    """
    model.eval()
    model.generation_config = _generation_config(settings, end_tokens(model, tokenizer), tokenizer.pad_token_id)
    for batch in batches:
        texts = [prompts[index] for index in batch]
        torch.manual_seed(_batch_seed(settings.seed, texts))
        yield batch, _sample(model, tokenizer, texts, settings)


def _batch_seed(seed: int, prompts: list[str]) -> int:
    digest = hashlib.sha256("\0".join([str(seed), *prompts]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


@torch.inference_mode()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: SamplingSettings
) -> list[list[Answer]]:
    encoded = cast(list[list[int]], encode(prompts, tokenizer))  # prompts that have none are refused before
    rows: Any = {"input_ids": encoded}
    inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    ids, mask = inputs.input_ids.to(model.device), inputs.attention_mask.to(model.device)
    begin = _shared_cache(model, encoded[0][: shared_tokens(encoded)], mask)
    cache = _prompt_cache(model, ids, mask, settings.num_samples, begin)
    ids, mask = (tensor.repeat_interleave(settings.num_samples, dim=0) for tensor in (ids, mask))
    generate: Any = model.generate  # of a mixin that only language models have
    drawing = [DrawToken(settings.temperature, settings.top_p)] if settings.temperature > 0 else []
    stopping = {"stop_strings": [settings.stop], "tokenizer": tokenizer} if settings.stop else {}
    output = generate(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_processor=drawing, **stopping)
    ends = model.generation_config.eos_token_id
    answers = [
        _to_answer(tokenizer, row[row_mask.bool()].tolist(), new.tolist(), ends, settings.stop)
        for row, row_mask, new in zip(ids, mask, output[:, ids.shape[1] :])
    ]
    return [answers[start : start + settings.num_samples] for start in range(0, len(answers), settings.num_samples)]


def shared_tokens(prompts: list[list[int]]) -> int:
    """How many tokens to compute once for all prompts: worked examples, or a system message.

    0 where they are so few that another pass through the model costs more. Every prompt keeps its last token.
    """
    first, last = min(prompts), max(prompts)  # what these two begin with, all do
    shortest = min(map(len, prompts)) - 1
    length = next((at for at, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), shortest)
    return min(length, shortest) if len(prompts) > 1 and length >= _LEAST_SHARED else 0


def _shared_cache(model: PreTrainedModel, begin: list[int], mask: torch.Tensor) -> DynamicCache | None:
    """Keys and values of the first ``len(begin)`` columns of rows that are padded on the left and all begin alike.

    ``mask`` [B, width] is of the rows, of which the longest has no padding. A row with padding has the keys of its
    first tokens further to the right, so that its last shared tokens are computed again, as padding would be.

    Returns:
        None where nothing is shared, or the model keeps something else than keys and values of each token.
    """
    if not begin:
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    ids = torch.tensor([begin], device=mask.device)
    model(**only_accepted(model, input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    if cache.get_seq_length() != len(begin):
        return None
    padding = (mask == 0).sum(-1, keepdim=True)
    places = (torch.arange(len(begin), device=mask.device) - padding).clamp(min=0)  # under the mask: any
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = (one[0][:, places].transpose(0, 1) for one in (layer.keys, layer.values))
    return cache


def _prompt_cache(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, num_samples: int, begin: DynamicCache | None
) -> DynamicCache | None:
    """``begin`` and what follows, up to the last prompt token: computed once for all samples of a prompt."""
    if num_samples == 1 or ids.shape[1] == 1:
        return begin
    cache = DynamicCache(config=model.config) if begin is None else begin
    done = cache.get_seq_length()
    if done < ids.shape[1] - 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(
            input_ids=ids[:, done:-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, done:-1],
            past_key_values=cache,
            logits_to_keep=1,
        )
    cache.batch_repeat_interleave(num_samples)
    return cache


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos, and those that the model was published with."""
    published = model.generation_config.eos_token_id
    published = published if isinstance(published, list) else [published]
    return sorted({tokenizer.eos_token_id, *(token for token in published if token is not None)})


def _generation_config(settings: SamplingSettings, ends: list[int], pad_token_id: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=ends, pad_token_id=pad_token_id
    )


def _to_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int], ends: list[int], stop: str | None
) -> Answer:
    def decoded(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)  # of one list of tokens

    length = next((position for position, token in enumerate(new) if token in ends), len(new))
    ids = new[:length]
    # Some tokenizers drop a leading space when they decode, so the answer is what it adds to the decoded prompt.
    text = decoded(prompt + ids)[len(decoded(prompt)) :]
    num_tokens = min(length + 1, len(new))
    if stop is None or stop not in text:
        return Answer(text, finished=length < len(new), num_tokens=num_tokens, token_ids=tuple(ids))
    # generate() fills the row up with padding, which is an end only where it is the eos token.
    num_tokens = min(num_tokens, len(new) - _trailing(tokenizer.pad_token_id, new))
    text = text.partition(stop)[0]
    while ids and len(decoded(prompt + ids)) > len(decoded(prompt)) + len(text):
        ids.pop()
    return Answer(text, finished=True, num_tokens=num_tokens, token_ids=tuple(ids))


def _trailing(token: int | None, tokens: list[int]) -> int:
    return next((count for count, one in enumerate(reversed(tokens)) if one != token), len(tokens))


# `sample_batches`, or another way to answers.
Decode = Callable[..., Iterator[tuple[list[int], list[list[Answer]]]]]
# From problems with all their answers to as many rows each, so that answers are graded together.
MakeRows = Callable[[list[tuple[Problem, list[Answer]]]], list[list[dict]]]


@dataclass(frozen=True)
class Job:
    """Problems that a model is to answer.

    Attributes:
        source: where the problems are from.
        prompts: of the problems, shielded as ``special_text.py`` says.
    """

    config: WriterConfig
    source: str
    problems: list[Problem]
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingSettings

    def description(self) -> dict:
        """Everything the answers depend on, as JSON."""
        config = self.config
        return {
            "model": config.model.path,
            "weights": weights_id(config.model.path, user_cache_dir("prior")),
            "dtype": config.ds.param_dtype,
            "problems": self.source,
            "num_problems": len(self.problems),
            "problems_sha256": digest_of(self.problems),
            "grader": grader_name(),
            "first_prompt": self.prompts[0],
            **asdict(self.sampling),
        }

    def load_model(self) -> PreTrainedModel:
        config = self.config
        if hint := slow_dtype_hint(config.ds.param_dtype):
            log.info(hint)
        model = load_causal_lm(
            config.model.path,
            dtype_of(config.ds.param_dtype),
            resolve_attention(config.ds.attn_implementation, config.ds.param_dtype),
            trust_remote_code=config.model.trust_remote_code,
            experts_implementation=config.ds.experts_implementation,
        )
        return model.to(device())  # type: ignore[arg-type]  # transformers' decorator hides that it is a method


def prepare_job(config: GenerateConfig, sampling: SamplingSettings) -> Job:
    """Read everything but the model's weights, so that most mistakes show within seconds.

    Raises:
        UserError: a flag is missing or wrong, or the problem file cannot be read.
    """
    config.check()
    if config.use_ms:
        use_modelscope()
    path = config.problems.path
    problems = read_problems(path, config.problems.max, config.problems.split, config.use_ms)
    tokenizer = load_writer(config)
    prompts, stop = write_prompts(problems, tokenizer, config)
    return Job(config, path, problems, prompts, tokenizer, replace(sampling, stop=stop))


def load_writer(config: WriterConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that writes prompts, with the chat template that the flags name.

    Raises:
        UserError: there is none, or the template cannot be used.
    """
    tokenizer = load_tokenizer(
        config.model.path,
        use_fast=not config.data.disable_fast_tokenizer,
        trust_remote_code=config.model.trust_remote_code,
        padding_side="left",
    )
    if config.data.apply_chat_template:
        use_chat_template(tokenizer, config.data.tokenizer_chat_template)
    return tokenizer


def run_job(job: Job, file: RowFile, make_rows: MakeRows, title: str, decode: Decode = sample_batches) -> None:
    """Answer every problem that ``file`` lacks; its rows get ``problem_id`` and ``sample`` (0 to K - 1) first."""
    done = {(row["problem_id"], row["sample"]) for row in file.rows}
    samples = range(job.sampling.num_samples)
    batches = [
        batch
        for batch in plan_batches(job.prompts, job.sampling)
        if any((job.problems[index].problem_id, sample) not in done for index in batch for sample in samples)
    ]
    if not batches:
        return
    model = job.load_model()
    total = len(job.problems) * len(samples)
    hidden = os.environ.get("RANK", "0") != "0"
    with tqdm(total=total, initial=len(done), desc=title, unit="answer", dynamic_ncols=True, disable=hidden) as bar:
        for batch, answers in decode(model, job.tokenizer, job.prompts, batches, job.sampling):
            problems = [job.problems[index] for index in batch]
            rows = [
                {"problem_id": problem.problem_id, "sample": sample} | row
                for problem, of_problem in zip(problems, make_rows(list(zip(problems, answers))))
                for sample, row in enumerate(of_problem)
                if (problem.problem_id, sample) not in done
            ]
            file.append(rows)
            bar.update(len(rows))
