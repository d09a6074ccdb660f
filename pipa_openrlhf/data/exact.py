"""Which texts a tokenizer surely keeps, piece by piece, so that they need not be decoded again to see it."""

import json
from collections.abc import Callable
from weakref import WeakKeyDictionary

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
# By tokenizer: how many tokens it had when it was looked at, and what it keeps.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Callable[[str], bool]]] = WeakKeyDictionary()


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
