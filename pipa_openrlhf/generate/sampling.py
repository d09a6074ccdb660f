"""From prompts to answers: a model continues them in batches of similar length, which its answers leave as they end.

A batch has a seed of its own, made from the run's seed and the prompts in it. A run that was stopped and continued
therefore draws the same answers as one that was not.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.generate.drawing import DrawToken
from pipa_openrlhf.model.output_head import only_accepted

# Tokens. Another pass through the model reads all of its weights, which fewer tokens do not pay for.
_LEAST_SHARED = 16
# Between looks at which rows have ended. Taking rows out of a cache costs about as much as one more token.
_TOKENS_AT_A_TIME = 16


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
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=end_tokens(model.generation_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    for batch in batches:
        texts = [prompts[index] for index in batch]
        torch.manual_seed(seed_of(settings.seed, texts))
        yield batch, _sample(model, tokenizer, texts, settings)


def seed_of(seed: int, texts: list[str]) -> int:
    """A seed for what is drawn after these texts, whatever was drawn before."""
    digest = hashlib.sha256("\0".join([str(seed), *texts]).encode()).digest()
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
    drawn = iter(_draw(model, tokenizer, ids, mask, cache, settings))
    ends = end_tokens(model.generation_config, tokenizer)
    return [
        [to_answer(tokenizer, prompt, *next(drawn), ends, settings.stop) for _ in range(settings.num_samples)]
        for prompt in encoded
    ]


def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    settings: SamplingSettings,
) -> list[tuple[list[int], bool]]:
    """The tokens that follow each row of ``ids`` [R, width], and whether the model ended them.

    Rows that have ended leave the batch. generate() would compute them until the last one has, so that it is asked for
    a few tokens at a time.
    """
    generate: Any = model.generate  # of a mixin that only language models have
    drawing = DrawToken(settings.temperature, settings.top_p, len(ids))
    criteria = _end_criteria(model, settings.stop, tokenizer)
    at_a_time = _TOKENS_AT_A_TIME if _rows_can_leave(model) else settings.max_new_tokens
    width = ids.shape[1]
    new: list[list[int]] = [[] for _ in ids]
    is_over = [False] * len(ids)
    rows, left = list(range(len(ids))), settings.max_new_tokens
    while rows and left > 0:
        ended = _Ended(criteria, len(ids), width, ids.device)
        output = generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(left, at_a_time),
            logits_processor=[drawing] if settings.temperature > 0 else [],
            stopping_criteria=StoppingCriteriaList([ended]),
            return_dict_in_generate=True,
        )
        drawn = output.sequences[:, ids.shape[1] :]
        for row, tokens, length, over in zip(rows, drawn.tolist(), ended.lengths.tolist(), ended.rows.tolist()):
            new[row] += tokens[:length]
            is_over[row] = over
        going = (~ended.rows).nonzero()[:, 0]
        left, cache = left - at_a_time, output.past_key_values
        if cache is not None and 0 < len(going) < len(rows) and left > 0:
            cache.batch_select_indices(going)
        rows = drawing.rows = [row for row in rows if not is_over[row]]
        ids, mask = output.sequences[going], torch.cat([mask, torch.ones_like(drawn)], dim=1)[going]
    return list(zip(new, is_over))


class _Ended(StoppingCriteria):
    """Notes which rows [R] have ended, and how many tokens [R] each has got, its end included.

    What ends an answer begins in it: the columns before ``width`` are not looked at.
    """

    def __init__(self, criteria: list[StoppingCriteria], count: int, width: int, device: torch.device):
        self._criteria, self._width = criteria, width
        self.rows = torch.zeros(count, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        self.lengths += ~self.rows
        for criterion in self._criteria:
            self.rows |= criterion(input_ids[:, self._width :], scores, **options)
        return self.rows


def _end_criteria(
    model: PreTrainedModel, stop: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[StoppingCriteria]:
    criteria: list[StoppingCriteria] = [EosTokenCriteria(end_tokens(model.generation_config, tokenizer))]
    return criteria if stop is None else [*criteria, StopStringCriteria(tokenizer, [stop])]


def _layers(model: PreTrainedModel) -> set[type]:
    """What the model keeps of the tokens that it has seen, in any of its layers."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers}


def _rows_can_leave(model: PreTrainedModel) -> bool:
    """Whether all that the model knows of a row is in keys and values of its own; some keep a state in themselves."""
    return _layers(model) <= {DynamicLayer, DynamicSlidingWindowLayer} and not model._is_stateful


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
    if _layers(model) != {DynamicLayer}:
        return None
    cache = DynamicCache(config=model.config)
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


def end_tokens(published: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos, and those that the model was published with."""
    ends = published.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(token for token in ends if token is not None)})


def to_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    new: list[int],
    is_over: bool,
    ends: list[int],
    stop: str | None,
) -> Answer:
    """The answer of the tokens ``new`` after the prompt's.

    Args:
        is_over: the last of them, or the last few, ended it.
    """

    def decoded(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)  # of one list of tokens

    ids = new[:-1] if new and new[-1] in ends else list(new)
    # Some tokenizers drop a leading space when they decode, so the answer is what it adds to the decoded prompt.
    before = len(decoded(prompt))
    text = decoded(prompt + ids)[before:]
    if stop is not None and stop in text:
        is_over = True
        text = text.partition(stop)[0]
        while ids and len(decoded(prompt + ids)) > before + len(text):
            ids.pop()
    return Answer(text, finished=is_over, num_tokens=len(new), token_ids=tuple(ids))
