"""What is said to keep a text keeps it, and what does not is never said to."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import surely_keeps, tokenise

ODD = ["<eos>", " <eos> x", "é\u0301", "K\u212a", "\u3000a  b\r\n", "caf\xe9"]
TEXTS = st.text(max_size=20) | st.sampled_from(ODD)


def changed(tokenizers, change) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizers["bytes"])
    change(tokenizer.backend_tokenizer)
    return tokenizer


@given(pieces=st.lists(TEXTS, min_size=1, max_size=4))
def test_a_kept_text_is_the_same_after_decoding(tokenizers, pieces):
    tokenizer = tokenizers["bytes"]
    kept = surely_keeps(tokenizer)
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    assert kept("".join(pieces))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)


LOSSY = {
    "a prefix space": lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "dropped spaces": lambda one: setattr(
        one,
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)]),
    ),
    "lower case": lambda one: setattr(one, "normalizer", normalizers.Lowercase()),
    "a token that takes a space": lambda one: one.add_tokens([AddedToken("<x>", lstrip=True)]),
    "a token that is read as bytes": lambda one: one.add_tokens([AddedToken("é", normalized=False)]),
}


@pytest.mark.parametrize("what", LOSSY)
def test_nothing_is_said_of_a_tokenizer_that_may_lose_text(tokenizers, what):
    assert not surely_keeps(changed(tokenizers, LOSSY[what]))("abc")


@pytest.mark.parametrize("name", ["words", "metaspace", "characters"])
def test_nothing_is_said_of_other_kinds(tokenizers, name):
    assert not surely_keeps(tokenizers[name])("abc")


def test_nfc_keeps_ascii_only(tokenizers):
    kept = surely_keeps(changed(tokenizers, lambda one: setattr(one, "normalizer", normalizers.NFC())))
    assert kept("abc") and not kept("e\u0301")


def test_splits_that_keep_everything_are_known(tokenizers):
    splits = [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.Digits(True)]
    whole = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert surely_keeps(changed(tokenizers, lambda one: setattr(one, "pre_tokenizer", whole)))("a 1")


@pytest.mark.parametrize("what", ["as it is", *LOSSY])
def test_samples_are_those_of_decoding_every_text(tokenizers, monkeypatch, what):
    tokenizer = changed(tokenizers, LOSSY.get(what, lambda one: None))
    texts = ["the cat", " sat <eos> on", "x <x> y", "Caf\xe9 é", "a  b\n"]
    records = [Record(one, [two, one], None, 1, "p", "w") for one in texts for two in texts]
    found = tokenise(records, tokenizer, max_len=100)
    monkeypatch.setattr("pipa_openrlhf.data.tokenise.surely_keeps", lambda tokenizer: lambda text: False)
    monkeypatch.setattr("pipa_openrlhf.data.tokenise.is_plain", lambda tokenizer: False)
    expected = tokenise(records, tokenizer, max_len=100)
    assert [one.input_ids.tolist() for one in found[0]] == [one.input_ids.tolist() for one in expected[0]]
    assert found[1].counts == expected[1].counts
