"""Records to token ids and per-token labels, with exact boundaries between prompt, steps and masked text."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.record import Dropped, Record, Unusable
from pipa_openrlhf.data.render import Piece, Rendered, render
from pipa_openrlhf.data.samples import Sample
from pipa_openrlhf.data.special_text import NOT_AS_TEXT, is_shielded, special_text
from pipa_openrlhf.errors import UserError

_CHUNK = 1024  # records a call of the tokenizer: it works in parallel on the texts of one call
_PROMPT = -1  # stands for the step of a prompt token

TOO_LONG = "longer than --data.max_len"
STRADDLES = "boundary inside a token"
NO_OFFSETS = "the slow tokenizer reports no boundaries (remove --data.disable_fast_tokenizer)"
NO_TOKEN = "no unmasked response token"
NO_ANSWER_LABEL = "beginnings of answers without a label of the whole (they have step labels: --data.annotation step)"

_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
# By tokenizer: how many tokens it had when it was looked at, and what it keeps.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Callable[[str], bool]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Tokens:
    """Token ids of prompt and answer without eos; ``steps`` is ``_PROMPT`` on the prompt."""

    ids: list[int]
    steps: list[int]
    masked: list[bool]


def tokenise(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    annotation: str = "answer",
    step_separator: str = "\n",
    special_tokens: str = "text",
) -> tuple[list[Sample], Dropped]:
    """Samples in the order of their records, of which some hundreds are in memory at once, and what was dropped.

    Raises:
        UserError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token: set eos_token in its tokenizer_config.json")
    samples: list[Sample] = []
    dropped = Dropped()
    left = iter(records)
    while chunk := list(islice(left, _CHUNK)):
        usable = list(_render_all(chunk, tokenizer, dropped, step_separator, special_tokens))
        tokens = _tokenise_all([rendered for _, rendered in usable], tokenizer)
        for (record, _), outcome in zip(usable, tokens, strict=True):
            sample = outcome if isinstance(outcome, str) else _sample(record, outcome, tokenizer, annotation)
            if isinstance(sample, str):
                dropped.add(sample, record.where)
            elif reason := _reason_to_drop(sample, max_len):
                dropped.add(reason, record.where)
            else:
                samples.append(sample)
    return samples, dropped


def _render_all(records, tokenizer, dropped: Dropped, *options: str) -> Iterator[tuple[Record, Rendered]]:
    for record in records:
        try:
            yield record, render(record, tokenizer, *options)
        except Unusable as reason:
            dropped.add(str(reason), record.where)


def _tokenise_all(rendered: list[Rendered], tokenizer) -> list[_Tokens | str]:
    """Tokens of each text, or the reason why it has none."""
    if not rendered:
        return []
    outcomes = _tokenise_by_piece(rendered, tokenizer)
    # Tokenizers that add a space in front of every text, or lose spaces, do not survive being called piece by piece.
    is_kept, unshield = surely_keeps(tokenizer), special_text(tokenizer).unshield
    texts = {index: unshield(_whole_text(item)) for index, item in enumerate(rendered)}
    unsure = {
        index: tokens
        for index, tokens in enumerate(outcomes)
        if not isinstance(tokens, str) and not is_kept(texts[index])
    }
    if not unsure:
        return outcomes
    decoded = tokenizer.batch_decode(
        [tokens.ids for tokens in unsure.values()], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    changed = [index for index, other in zip(unsure, decoded, strict=True) if texts[index] != other]
    if changed:
        whole = _tokenise_whole([rendered[index] for index in changed], tokenizer)
        for index, outcome in zip(changed, whole, strict=True):
            outcomes[index] = outcome if isinstance(outcome, str) else _same_prompt(outcome, unsure[index])
    return outcomes


def _same_prompt(tokens: _Tokens, alone: _Tokens) -> _Tokens | str:
    """Generation tokenises the prompt alone; training on other prompt tokens would teach something else."""
    return tokens if _prompt_ids(tokens) == _prompt_ids(alone) else STRADDLES


def _prompt_ids(tokens: _Tokens) -> list[int]:
    return tokens.ids[: tokens.steps.count(_PROMPT)]


def _tokenise_by_piece(rendered: list[Rendered], tokenizer) -> list[_Tokens | str]:
    """Each piece on its own, so that the prompt has the very tokens that generation starts from."""
    texts = (text for item in rendered for text in (item.prompt, *(piece.text for piece in item.pieces)) if text)
    unique = list(dict.fromkeys(texts))
    ids_of: dict[str, list[int] | None] = {"": []}
    ids_of.update(zip(unique, encode(unique, tokenizer), strict=True))

    def join(item: Rendered) -> _Tokens | str:
        ids, steps, masked = [], [], []
        for piece in _all_pieces(item):
            piece_ids = ids_of[piece.text]
            if piece_ids is None:
                return NOT_AS_TEXT
            ids += piece_ids
            steps += [piece.step] * len(piece_ids)
            masked += [piece.masked] * len(piece_ids)
        return _Tokens(ids, steps, masked)

    return [join(item) for item in rendered]


def _tokenise_whole(rendered: list[Rendered], tokenizer) -> list[_Tokens | str]:
    """The whole text in one call; a token that reaches over a boundary makes the record unusable."""
    if not tokenizer.is_fast:
        return [NO_OFFSETS] * len(rendered)
    special = special_text(tokenizer)
    texts = [_whole_text(item) for item in rendered]
    outcomes: list[_Tokens | str] = [NOT_AS_TEXT] * len(texts)
    for as_text in (False, True):
        # One call takes either all special tokens as text, or none.
        chosen = [
            index
            for index, text in enumerate(texts)
            if is_shielded(text) == as_text and not (as_text and special.find(text))
        ]
        if not chosen:
            continue
        plain = [special.unshield(texts[index]) for index in chosen]
        encoded = _encode(tokenizer, plain, as_text, return_offsets_mapping=True)
        for index, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if not as_text or special.has_none(ids):
                outcomes[index] = _place(rendered[index], ids, offsets)
    return outcomes


def _place(item: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens | str:
    pieces = _all_pieces(item)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    owner = np.minimum(np.searchsorted(ends, spans[:, 0], side="right"), len(pieces) - 1)
    owner = np.maximum.accumulate(owner)  # a token without characters belongs where its neighbour does
    if (spans[:, 1] > ends[owner]).any():
        return STRADDLES
    return _Tokens(ids, [pieces[index].step for index in owner], [pieces[index].masked for index in owner])


def _all_pieces(item: Rendered) -> list[Piece]:
    return [Piece(item.prompt, _PROMPT, False), *item.pieces]


def _whole_text(item: Rendered) -> str:
    return "".join(piece.text for piece in _all_pieces(item))


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int] | None]:
    """Token ids of texts, which may be shielded; the same in training and generation.

    Returns:
        None for a text that spells a special token, where the tokenizer cannot take that as text.
    """
    special = special_text(tokenizer)
    parts = [special.split(text) if is_shielded(text) else [] for text in texts]
    # By whether special tokens in it are text.
    wanted: dict[bool, dict[str, list[int]]] = {
        False: {text: [] for text, cut in zip(texts, parts) if not cut},
        True: {},
    }
    for part, is_special in (one for cut in parts for one in cut):
        wanted[not is_special][part] = []
    for as_text, ids_of in wanted.items():
        if ids_of:
            ids_of.update(zip(ids_of, _token_ids(tokenizer, list(ids_of), as_text), strict=True))

    def join(cut: list[tuple[str, bool]]) -> list[int] | None:
        if not all(is_special or special.has_none(wanted[True][part]) for part, is_special in cut):
            return None
        return [token for part, is_special in cut for token in wanted[not is_special][part]]

    return [join(cut) if cut else wanted[False][text] for text, cut in zip(texts, parts)]


def _token_ids(tokenizer, texts: list[str], as_text: bool) -> list[list[int]]:
    if not is_plain(tokenizer):
        return _encode(tokenizer, texts, as_text)["input_ids"]
    # The same call without the offsets and masks that nobody reads: they take as long as the tokens.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = as_text or tokenizer.split_special_tokens
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _encode(tokenizer, texts: list[str], as_text: bool, **options):
    """Args: as_text: special tokens that the texts spell are text."""
    if as_text:
        options["split_special_tokens"] = True
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _sample(record: Record, tokens: _Tokens, tokenizer, annotation: str) -> Sample | str:
    """The sample, or the reason why there is none."""
    step_labels = record.step_labels if annotation == "step" else [record.label] * len(record.steps)
    if step_labels is None or (annotation == "answer" and record.label is None):
        return NO_ANSWER_LABEL
    prompt_len = tokens.steps.count(_PROMPT)
    ids, steps, masked = tokens.ids, tokens.steps[prompt_len:], tokens.masked[prompt_len:]
    if record.complete:
        ids, steps, masked = [*ids, tokenizer.eos_token_id], [*steps, len(record.steps) - 1], [*masked, False]
    step_ids = np.array(steps, dtype=np.int32)
    is_labelled = np.array([label is not None for label in step_labels])
    mask = (~np.array(masked, dtype=bool) & is_labelled[step_ids]).astype(np.int8)
    if prompt_len == 0:
        mask[:1] = 0  # no hidden state predicts the first token of a sequence
    return Sample(
        input_ids=np.array(ids, dtype=np.int32),
        prompt_len=prompt_len,
        labels=np.array([label or 0 for label in step_labels], dtype=np.int8)[step_ids],
        mask=mask,
        step_ids=step_ids,
        answer_label=_side(record, step_labels),
        weight=record.weight,
        problem_id=record.problem_id,
        pair_id=record.pair_id,
        where=record.where,
    )


def _side(record: Record, step_labels: list[int | None]) -> int:
    """Right or wrong as a whole: of the beginning of an answer, whether it has no wrong step."""
    return int(0 not in step_labels) if record.label is None else record.label


def _reason_to_drop(sample: Sample, max_len: int) -> str | None:
    if len(sample.input_ids) > max_len:
        return TOO_LONG
    return None if sample.mask.any() else NO_TOKEN


def surely_keeps(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """Whether a text, encoded in pieces and decoded again, is proven to be the same.

    Byte-level BPE writes every byte of a piece into a token, and the bytes of all tokens are the text, however it was
    cut. False says that nothing is known: the text has to be decoded and compared.
    """
    size = len(tokenizer)
    if _known.get(tokenizer, (None,))[0] != size:
        _known[tokenizer] = size, _kept_texts(tokenizer)
    return _known[tokenizer][1]


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its texts go to the Rust tokenizer as they are: no Python code of a model's own comes between."""
    return tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")


def _kept_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    if not is_plain(tokenizer):
        return lambda text: False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = parts["normalizer"]
    # NFC, which Qwen has, changes nothing in ASCII.
    if normalizer is not None and normalizer["type"] != "NFC":
        return lambda text: False
    if not (_is_byte_level(parts) and all(_is_kept(one, tokenizer, normalizer) for one in parts["added_tokens"])):
        return lambda text: False
    return (lambda text: True) if normalizer is None else str.isascii


def _is_byte_level(parts: dict) -> bool:
    """Every byte has a token, no byte is dropped, added or changed on the way, and decoding joins bytes."""
    model, before, decoder = parts["model"], parts["pre_tokenizer"] or {}, parts["decoder"] or {}
    *splits, last = before.get("pretokenizers", [before])
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and model["vocab"].keys() >= _ALPHABET
        and len(set(model["vocab"].values())) == len(model["vocab"])
        and all(one["type"] == "Digits" or (one["type"] == "Split" and one["behavior"] != "Removed") for one in splits)
        and last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and decoder.get("type") == "ByteLevel"
    )


def _is_kept(added: dict, tokenizer: PreTrainedTokenizerBase, normalizer: dict | None) -> bool:
    """An added token takes no space with it, stands for no other text, and decodes to its own."""
    content = added["content"]
    if added["lstrip"] or added["rstrip"] or (normalizer and added["normalized"] and not content.isascii()):
        return False
    decoded = tokenizer.backend_tokenizer.decode([added["id"]], skip_special_tokens=False)
    return decoded == content and tokenizer.backend_tokenizer.token_to_id(content) == added["id"]
