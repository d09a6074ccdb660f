"""Answers step by step: a model goes on from any of its states, many at a time, and keeps what it knows in between.

Keys and values of a prefix are computed once. They are kept a prefix at a time, without padding, so that any set of
prefixes can become the next batch: chosen, repeated, in another order, from several problems.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.drawing import draw_tokens, warpers
from pipa_openrlhf.model.output_head import decoder_of, only_accepted
from pipa_openrlhf.model.policy import ValueHead
from pipa_openrlhf.model.value_model import value_of

# Per layer [heads, prefix, width]: keys, and values.
_KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepSettings:
    """How steps are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        max_new_tokens: of an answer.
        step_ends: texts that end a step. Before the first other character of a step a line end does not count.
        stop: text before which an answer ends.
        ends: tokens that end an answer.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    step_ends: tuple[str, ...]
    stop: str | None
    ends: frozenset[int]


@dataclass(frozen=True)
class State:
    """A model after a prefix.

    Attributes:
        prompt, ids: tokens of the prompt, and of the answer as far as it goes.
        logits: [V] of the next token.
        value: g after the last token; 0 without a value head.
        blocks: code of the answer, where code is run, that came to its end.
    """

    prompt: list[int]
    ids: list[int]
    keys_values: _KeysValues
    logits: torch.Tensor
    value: float
    blocks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


@dataclass(frozen=True)
class Step:
    """What was drawn after a state.

    Attributes:
        ids: its tokens, without the one that ended the answer.
        log_prob: of all that was drawn, under the model itself, whatever the temperature.
        num_tokens: that were drawn.
        value: g after the last of ``ids``: of a finished answer, the g that predicted its end.
        finished: the model ended the answer.
        state: to go on from; None where the answer is finished, or as long as it may be.
    """

    ids: list[int]
    log_prob: float
    num_tokens: int
    value: float
    finished: bool
    state: State | None


@dataclass
class _Draft:
    """A step that is being drawn."""

    start: State
    chance: np.random.Generator
    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    num_tokens: int = 0

    def step(self, value: float, finished: bool, state: State | None = None) -> Step:
        return Step(self.ids, self.log_prob, self.num_tokens, value, finished, state)


class StepSampler:
    """Draws steps.

    Args:
        head: of values; None: they are 0.

    Raises:
        UserError: the model keeps something else than keys and values of each token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: StepSettings,
        head: ValueHead | None = None,
    ):
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._settings = settings
        self._head = None if head is None else head.to(model.device)
        self._warpers = warpers(settings.temperature, settings.top_p)
        _check_cache(model)

    @torch.inference_mode()
    def begin(self, prompts: Sequence[list[int]]) -> list[State]:
        """The states after prompts, token ids."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self._model.device)
        mask = _left_mask([len(prompt) for prompt in prompts], ids.device)
        cache = DynamicCache()
        logits, values = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        return [
            State(prompt, [], _cut(cache, row, width - len(prompt)), logits[row].clone(), values[row])
            for row, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def draw(self, starts: Sequence[State], chances: Sequence[np.random.Generator]) -> list[Step]:
        """One step after each of ``starts``, of which several may be the same, by the numbers of its own generator.

        What is drawn after a state does not depend on what is beside it, but for rounding.
        """
        drafts = [_Draft(start, chance) for start, chance in zip(starts, chances, strict=True)]
        steps: list[Step | None] = [None] * len(drafts)
        rows = _Rows(starts)
        while rows.numbers:
            tokens = self._choose(rows.logits, [drafts[number] for number in rows.numbers])
            for number, token, value in zip(rows.numbers, tokens, rows.values):
                steps[number] = self._add(drafts[number], token, value)
            rows.keep([at for at, number in enumerate(rows.numbers) if steps[number] is None])
            if not rows.numbers:
                break
            self._advance(rows, [drafts[number].ids[-1] for number in rows.numbers])
            for at, number in enumerate(rows.numbers):
                draft = drafts[number]
                if self._ends_step(draft.ids):
                    state = rows.state(at, draft.start, draft.ids)
                    steps[number] = draft.step(state.value, finished=False, state=state)
            rows.keep([at for at, number in enumerate(rows.numbers) if steps[number] is None])
        return [step for step in steps if step is not None]

    @torch.inference_mode()
    def extend(self, state: State, ids: list[int]) -> State:
        """The state after tokens that the model did not draw."""
        cache = _join([state.keys_values])
        new = torch.tensor([ids], device=self._model.device)
        mask = _left_mask([len(state) + len(ids)], new.device)
        logits, values = self._forward(new, mask, mask.cumsum(-1)[:, len(state) :] - 1, cache)
        kept = _cut(cache, 0, 0)
        return State(state.prompt, state.ids + ids, kept, logits[0].clone(), values[0], state.blocks)

    def _add(self, draft: _Draft, token: int, value: float) -> Step | None:
        """The step, where ``token`` ends it together with the answer. ``value`` is g before it."""
        settings = self._settings
        if token in settings.ends:
            return draft.step(value, finished=True)
        draft.ids.append(token)
        answer = draft.start.ids + draft.ids
        if settings.stop is not None and settings.stop in self._decode(answer):
            return draft.step(value, finished=True)
        return draft.step(value, finished=False) if len(answer) >= settings.max_new_tokens else None

    def _advance(self, rows: "_Rows", tokens: list[int]) -> None:
        """Run one token of each row through the model."""
        new = torch.tensor(tokens, device=rows.mask.device)[:, None]
        rows.mask = torch.cat([rows.mask, torch.ones_like(new)], dim=1)
        positions = rows.mask.sum(-1, keepdim=True) - 1
        rows.logits, rows.values = self._forward(new, rows.mask, positions, rows.cache)

    def text(self, prompt: list[int], ids: list[int]) -> str:
        """The text of an answer, up to the text before which it ends."""
        # Some tokenizers drop a leading space when they decode, so it is what the answer adds to the prompt.
        text = self._decode(prompt + ids)[len(self._decode(prompt)) :]
        return text.partition(self._settings.stop)[0] if self._settings.stop else text

    def _choose(self, logits: torch.Tensor, drafts: list[_Draft]) -> list[int]:
        """The next token of each row of ``logits`` [R, V], noted in its draft's log-prob."""
        logits = logits.float()
        if self._settings.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            numbers = torch.tensor([draft.chance.random() for draft in drafts], dtype=torch.float64)
            chosen = draw_tokens(self._warpers(torch.empty(0), logits), numbers)
        log_probs = (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for draft, log_prob in zip(drafts, log_probs):
            draft.log_prob += log_prob
            draft.num_tokens += 1
        return chosen.tolist()

    def _ends_step(self, ids: list[int]) -> bool:
        text = self._decode(ids).lstrip()
        return any(end in text for end in self._settings.step_ends)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, list[float]]:
        """[R, V] logits after the last of ``ids`` [R, L], and g there."""
        options = only_accepted(self._model, logits_to_keep=1, use_cache=True)
        with _last_hidden(self._model) as kept:
            output = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **options
            )
        values = [0.0] * len(ids) if self._head is None else value_of(self._head, kept[0]).tolist()
        return output.logits[:, -1], values


class _Rows:
    """Steps in progress, a row of a batch each.

    Attributes:
        numbers: which start each row is from.
        cache, mask: [R, width] of all tokens so far, those of the starts at the right end of the first columns.
        logits, values: [R, V] of the next token, and g before it.
    """

    def __init__(self, starts: Sequence[State]):
        self.numbers = list(range(len(starts)))
        self.logits = torch.stack([start.logits for start in starts])
        self.values = [start.value for start in starts]
        self.cache = _join([start.keys_values for start in starts])
        self.mask = _left_mask([len(start) for start in starts], self.logits.device)
        self._width = self.mask.shape[1]

    def keep(self, places: list[int]) -> None:
        """Drop the rows that are not at ``places``."""
        if len(places) == len(self.numbers):
            return
        self.numbers = [self.numbers[at] for at in places]
        self.values = [self.values[at] for at in places]
        self.logits, self.mask = self.logits[places], self.mask[places]
        if places:
            self.cache.batch_select_indices(torch.tensor(places, device=self.mask.device))

    def state(self, at: int, start: State, ids: list[int]) -> State:
        """The state of the row at ``at``, which began at ``start`` and has had ``ids`` since."""
        kept = _cut(self.cache, at, self._width - len(start))
        return State(start.prompt, start.ids + ids, kept, self.logits[at].clone(), self.values[at], start.blocks)


@contextmanager
def _last_hidden(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Within, the list gets the state [R, d] after the last token of each forward pass, the output head's input."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output.last_hidden_state[:, -1])

    handle = decoder_of(model).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _left_mask(lengths: list[int], device: torch.device) -> torch.Tensor:
    """[R, longest] ones where sequences of these lengths are, each at the right end of its row."""
    width = max(lengths)
    places = torch.arange(width, device=device)[None]
    return (places >= width - torch.tensor(lengths, device=device)[:, None]).long()


def _join(rows: list[_KeysValues]) -> DynamicCache:
    """Prefixes of any lengths as one cache, each at the right end of its row; zeros before them."""
    cache = DynamicCache()
    for layer in range(len(rows[0])):
        keys, values = (_pad([row[layer][side] for row in rows]) for side in (0, 1))
        cache.update(keys, values, layer)
    return cache


def _pad(parts: list[torch.Tensor]) -> torch.Tensor:
    width = max(part.shape[1] for part in parts)
    padded = parts[0].new_zeros(len(parts), parts[0].shape[0], width, parts[0].shape[2])
    for row, part in enumerate(parts):
        padded[row, :, width - part.shape[1] :] = part
    return padded


def _cut(cache: DynamicCache, row: int, first: int) -> _KeysValues:
    """Keys and values of one row from the column ``first`` on, in memory of their own."""
    layers: list[Any] = cache.layers
    return [(layer.keys[row, :, first:].clone(), layer.values[row, :, first:].clone()) for layer in layers]


def _check_cache(model: PreTrainedModel) -> None:
    """A sliding window is a matter of the mask here: all keys are kept."""
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(
                f"--evaluate.decode sbs goes on from keys and values of each token, and {type(model).__name__} keeps "
                "something else: use --evaluate.decode sample"
            )
