"""Text of data that spells a special token, such as ``<|im_end|>``: it becomes tokens of text, never that token.

It is shielded before a template is put around it: in a shielded text the first character of each such spelling is a
noncharacter of Unicode, U+FDD0 to U+FDEF, which stand for nothing and are meant for a program's own use. What spells a
special token after that is of the template. Nothing changes its place by being shielded.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.record import Record, Unusable
from pipa_openrlhf.errors import UserError

NOT_AS_TEXT = "text of a special token, which this tokenizer cannot take as text"
NONCHARACTER = "text with one of U+FDD0 to U+FDEF, which are no characters"

_SHIELDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_SHIELD = re.compile(f"[{_SHIELDS[0]}-{_SHIELDS[-1]}]")
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, SpecialText]]" = WeakKeyDictionary()


def special_text(tokenizer: PreTrainedTokenizerBase) -> "SpecialText":
    """What is known of the tokenizer's special tokens, looked at again where it names others.

    This is asked several times a record: the length of a tokenizer, which counts all added tokens, takes milliseconds.
    """
    version = tuple(tokenizer.all_special_tokens)
    if _known.get(tokenizer, (None,))[0] != version:
        _known[tokenizer] = version, SpecialText(tokenizer)
    return _known[tokenizer][1]


def is_shielded(text: str) -> bool:
    """Whether the text spells a special token that is to be tokenised as text."""
    return not text.isascii() and _SHIELD.search(text) is not None


def spelled_in(record: Record, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that the record spells; not the eos that ends it, nor what the user's template wrote."""
    special, eos = special_text(tokenizer), str(tokenizer.eos_token)
    prompt, parts = record.prompt, record.steps if record.messages is None else record.messages
    if isinstance(prompt, str):
        for start, end in reversed(record.own_spans):
            prompt = prompt[:start] + prompt[end:]
    *first, last = parts
    if isinstance(last, str):
        last = last.removesuffix(eos)
    elif isinstance(last.get("content"), str):
        last = {**last, "content": last["content"].removesuffix(eos)}
    return special.find_in([prompt, *first, last])


class SpecialText:
    """The spellings of a tokenizer's special tokens: those it declares as special, eos and its like among them.

    Attributes:
        ids: token ids of the special tokens, without the one for what is not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        declared = {str(one) for one in tokenizer.added_tokens_decoder.values() if one.special}
        spellings = sorted(filter(None, declared | set(tokenizer.all_special_tokens)), key=len, reverse=True)
        self.ids = {tokenizer.convert_tokens_to_ids(one) for one in spellings} - {tokenizer.unk_token_id}
        firsts = sorted({one[0] for one in spellings})
        if len(firsts) > len(_SHIELDS):
            problem = f"the tokenizer's special tokens begin with {len(firsts)} different letters"
            raise UserError(f"{problem}, more than {len(_SHIELDS)}: give a tokenizer with fewer special tokens")
        self._shield_of = dict(zip(firsts, _SHIELDS))
        either = "|".join(map(re.escape, spellings)) or r"(?!)"
        self._spelling = re.compile(f"({either})")
        self._start = re.compile(f"(?=(?:{either}))[\\s\\S]")  # spellings may overlap: each loses its first letter
        self._letter_of = str.maketrans({shield: letter for letter, shield in self._shield_of.items()})
        self._normalize = _normalizer(tokenizer)

    def find(self, text: str) -> str | None:
        """The first special token that the text spells."""
        found = self._spelling.search(text)
        return found[0] if found else None

    def find_in(self, value: Any) -> str | None:
        """The first special token that a text in a message, or in a list of them, spells."""
        if isinstance(value, str):
            return self.find(value)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next(filter(None, map(self.find_in, items)), None)

    def shield(self, text: str) -> str:
        """The text, of the same length, without any spelling of a special token.

        Raises:
            Unusable: it holds a noncharacter that shielding uses, or spells a special token once it is normalized.
        """
        if is_shielded(text):
            raise Unusable(NONCHARACTER)
        if self.find(text) is not None:
            text = self._start.sub(lambda start: self._shield_of[start[0]], text)
        if self._normalize is not None and self.find(self._normalize(text)) is not None:
            raise Unusable(NOT_AS_TEXT)
        return text

    def shield_outside(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """The text, shielded but for the stretches ``spans``, which are in order."""
        if not spans:
            return self.shield(text)
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        parts = [text[start:end] for start, end in pairwise(edges)]
        return "".join(part if index % 2 else self.shield(part) for index, part in enumerate(parts))

    def shield_all(self, value: Any) -> Any:
        """A message, or a list of them, with every text in it shielded."""
        return _map_texts(value, self.shield)

    def unshield(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self._letter_of) if is_shielded(text) else text

    def unshield_all(self, value: Any) -> Any:
        """A message, or a list of them, as it was."""
        return _map_texts(value, self.unshield)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """``(text, is it a special token)``: a shielded text cut at the special tokens of its template."""
        parts = self._spelling.split(text)
        return [(self.unshield(part), index % 2 == 1) for index, part in enumerate(parts) if part]

    def has_none(self, ids: Iterable[int]) -> bool:
        """Whether no token is a special one."""
        return self.ids.isdisjoint(ids)


def _map_texts(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, function) for key, item in value.items()}
    return [_map_texts(item, function) for item in value] if isinstance(value, list) else value


def _normalizer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str] | None:
    """What text goes through before some special token is looked for in it; None where all are looked for before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    late = any(one.special and one.normalized for one in tokenizer.added_tokens_decoder.values())
    return backend.normalizer.normalize_str if late and backend is not None and backend.normalizer else None
