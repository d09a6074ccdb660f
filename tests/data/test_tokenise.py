"""Labels land on the right tokens, whatever the steps and the tokenizer; what cannot be exact is dropped."""

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import NO_TOKEN, STRADDLES, TOO_LONG, tokenise

TEXT = st.text(st.sampled_from("abc 12+=.\n\té∑日<>"), min_size=1, max_size=12)
WORD = st.sampled_from(["the", "cat", "sat", "12", "+", "=", "mat", "unseen"])
SENTENCE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


def record(prompt, steps, labels=None, **more) -> Record:
    labels = [1] * len(steps) if labels is None else labels
    return Record(prompt, list(steps), list(labels), labels[-1], "p", "data.jsonl line 1", **more)


def one(tokenizer, item: Record, annotation="step", max_len=10_000, separator="\n"):
    """The sample of one record, or the reason why it was dropped."""
    samples, dropped = tokenise([item], tokenizer, max_len=max_len, annotation=annotation, step_separator=separator)
    assert len(samples) + dropped.counts.total() == 1
    return samples[0] if samples else next(iter(dropped.counts))


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def step_texts(tokenizer, sample) -> list[str]:
    """What the tokens of each step read, the prompt before them decoded along with it."""
    texts, shown = [], len(decode(tokenizer, sample.input_ids[: sample.prompt_len]))
    for step in range(sample.step_ids.max() + 1):
        end = sample.prompt_len + np.count_nonzero(sample.step_ids <= step)
        whole = decode(tokenizer, sample.input_ids[:end])
        texts.append(whole[shown:])
        shown = len(whole)
    return texts


def check_labels(sample, tokenizer, labels):
    """What holds for every sample of every tokenizer."""
    assert (np.diff(sample.step_ids) >= 0).all()
    assert sample.labels.tolist() == [labels[step] for step in sample.step_ids]
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert sample.step_ids[-1] == len(labels) - 1
    assert len(sample.input_ids) == sample.prompt_len + len(sample.labels)
    assert len(sample.labels) == len(sample.mask) == len(sample.step_ids)
    assert (sample.input_ids.dtype, sample.labels.dtype, sample.mask.dtype) == (np.int32, np.int8, np.int8)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), name=st.sampled_from(["bytes", "characters"]), separator=st.sampled_from(["\n", "", " ", "\n\n"])
)
def test_exact_tokenizers_take_everything(tokenizers, data, name, separator):
    tokenizer = tokenizers[name]
    alphabet = TEXT if name == "bytes" else TEXT.map(lambda text: text.replace("日", "a").replace("\t", "b"))
    prompt = data.draw(st.one_of(st.just(""), alphabet))
    steps = data.draw(st.lists(alphabet, min_size=1, max_size=4))
    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(steps), max_size=len(steps)))
    sample = one(tokenizer, record(prompt, steps, labels), separator=separator)
    check_labels(sample, tokenizer, labels)
    expected = [step + separator for step in steps[:-1]] + [steps[-1] + "<eos>"]
    for index, text in enumerate(expected):
        ids = sample.input_ids[sample.prompt_len :][sample.step_ids == index]
        assert decode(tokenizer, ids) == text
    assert sample.input_ids[: sample.prompt_len].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample.mask.tolist() == [int(bool(prompt))] + [1] * (len(sample.mask) - 1)


@settings(max_examples=150, deadline=None)
@given(
    prompt=SENTENCE,
    steps=st.lists(SENTENCE, min_size=1, max_size=4),
    labels=st.lists(st.integers(0, 1), min_size=4, max_size=4),
)
def test_a_tokenizer_that_loses_whitespace(tokenizers, prompt, steps, labels):
    tokenizer, labels = tokenizers["words"], labels[: len(steps)]
    sample = one(tokenizer, record(prompt + "\n", steps, labels))
    check_labels(sample, tokenizer, labels)
    assert sample.prompt_len == len(prompt.split())
    counts = [len(step.split()) for step in steps]
    counts[-1] += 1  # eos
    assert np.bincount(sample.step_ids).tolist() == counts


@settings(max_examples=150, deadline=None)
@given(
    prompt=SENTENCE,
    steps=st.lists(SENTENCE, min_size=1, max_size=4),
    labels=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    separator=st.sampled_from(["\n", " ", ""]),
)
def test_a_tokenizer_that_puts_a_space_in_front(tokenizers, prompt, steps, labels, separator):
    tokenizer, labels = tokenizers["metaspace"], labels[: len(steps)]
    sample = one(tokenizer, record(prompt, [f" {step}" for step in steps], labels), separator=separator)
    if isinstance(sample, str):
        assert sample == STRADDLES
        assert separator == " "  # "cat " + " sat": the two spaces make one token
        return
    check_labels(sample, tokenizer, labels)
    # Its vocabulary lacks a few characters; elsewhere the text comes back exactly, step by step.
    expected = [f" {step}{separator}" for step in steps[:-1]] + [f" {steps[-1]}<eos>"]
    assert step_texts(tokenizer, sample) == expected


def test_separator_belongs_to_the_step_before_it_and_eos_to_the_last(tokenizers):
    sample = one(tokenizers["characters"], record("Q\n", ["ab", "c"], [0, 1]))
    #                                   a  b \n  c eos
    assert sample.step_ids.tolist() == [0, 0, 0, 1, 1]
    assert sample.labels.tolist() == [0, 0, 0, 1, 1]
    assert decode(tokenizers["characters"], sample.input_ids) == "Q\nab\nc<eos>"
    assert sample.prompt_len == 2


def test_answer_annotation_labels_every_token_alike(tokenizers):
    sample = one(tokenizers["characters"], record("Q", ["ab", "c"], [1, 0]), annotation="answer")
    assert sample.labels.tolist() == [0] * 5
    assert sample.step_ids.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["bytes", "characters", "words", "metaspace"])
def test_eos_is_not_doubled(tokenizers, name):
    tokenizer = tokenizers[name]
    plain = one(tokenizer, record("the\n", ["cat", "sat"]))
    written = one(tokenizer, record("the\n", ["cat", "sat<eos>"]))
    assert plain.input_ids.tolist() == written.input_ids.tolist()
    assert plain.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_an_answer_that_is_only_eos(tokenizers):
    sample = one(tokenizers["characters"], record("Q", ["<eos>"]))
    assert (sample.prompt_len, len(sample.labels), sample.mask.tolist()) == (1, 1, [1])


def test_no_text_is_stripped_and_none_added(tokenizers):
    sample = one(tokenizers["bytes"], record("  Q \n\n", ["  a  ", " b \n"]))
    assert decode(tokenizers["bytes"], sample.input_ids) == "  Q \n\n  a  \n b \n<eos>"
    assert decode(tokenizers["bytes"], sample.input_ids[: sample.prompt_len]) == "  Q \n\n"


def test_special_tokens_that_the_tokenizer_adds_by_itself_stay_out(tokenizers):
    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(tokenizers["characters"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    sample = one(tokenizer, record("Q", ["a"]))
    assert decode(tokenizer, sample.input_ids) == "Qa<eos>"


def test_masked_text_has_its_own_tokens(tokenizers):
    step = "x<output>3</output>y"
    span = (1, 1, len(step) - 1)
    for name in ("bytes", "characters"):
        tokenizer = tokenizers[name]
        sample = one(tokenizer, record("Q", ["a", step], [1, 0], masked_spans=(span,)))
        ids = sample.input_ids[sample.prompt_len :]
        assert decode(tokenizer, ids[sample.mask == 0]) == "<output>3</output>"
        assert decode(tokenizer, ids[sample.mask == 1]) == "a\nxy<eos>"
        check_labels(sample, tokenizer, [1, 0])


def test_masked_text_at_the_end_leaves_eos_unmasked(tokenizers):
    sample = one(tokenizers["characters"], record("Q", ["ab"], masked_spans=((0, 0, 2),)))
    assert sample.mask.tolist() == [0, 0, 1]


def test_several_spans_of_a_step(tokenizers):
    sample = one(tokenizers["characters"], record("Q", ["abcdef"], masked_spans=((0, 4, 5), (0, 1, 3))))
    assert sample.mask.tolist() == [1, 0, 0, 1, 0, 1, 1]


def test_the_first_token_after_an_empty_prompt_is_outside_the_loss(tokenizers):
    sample = one(tokenizers["characters"], record("", ["ab"]))
    assert (sample.prompt_len, sample.mask.tolist()) == (0, [0, 1, 1])
    assert one(tokenizers["characters"], record("", ["<eos>"])) == NO_TOKEN


def test_length_counts_prompt_answer_and_eos(tokenizers):
    item = record("Qu", ["ab", "c"])  # 2 + 4 + eos
    assert len(one(tokenizers["characters"], item, max_len=7).input_ids) == 7
    assert one(tokenizers["characters"], item, max_len=6) == TOO_LONG


@pytest.mark.parametrize("steps", [["mat", "cat"], ["unseen", "unseen"], ["the", "cat"]])
def test_a_token_over_a_boundary_drops_the_record(tokenizers, steps):
    item = record("the ", steps)
    assert one(tokenizers["words"], item, separator="") == STRADDLES
    assert one(tokenizers["words"], record("sat", ["mat"])) == STRADDLES


def test_a_space_before_the_boundary_that_the_next_token_takes(tokenizers):
    # "the " alone ends in a token of its own, which "the cat" does not have: generation would see another prompt.
    assert one(tokenizers["metaspace"], record("the ", ["cat"])) == STRADDLES
    sample = one(tokenizers["metaspace"], record("the", [" cat"]))
    alone = tokenizers["metaspace"]("the", add_special_tokens=False)["input_ids"]
    assert sample.input_ids[: sample.prompt_len].tolist() == alone


def test_offsets_that_leave_out_the_space_in_front(tokenizers):
    # Such offsets say that "the " and "cat" share no token, but " cat" is one.
    from tokenizers import pre_tokenizers, processors

    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert one(tokenizer, record("the ", ["cat"])) == STRADDLES
    assert one(tokenizer, record("the", [" cat"])).prompt_len == len(tokenizer("the")["input_ids"])


def test_order_and_fields_survive_many_records(tokenizers):
    records = [
        Record(f"the {index}\n", ["cat"], None, index % 2, f"p{index}", f"line {index}", pair_id=index // 2)
        for index in range(2100)  # more than two chunks
    ]
    samples, dropped = tokenise(records, tokenizers["bytes"], max_len=100)
    assert not dropped.counts
    for index, sample in enumerate(samples):
        assert (sample.problem_id, sample.where, sample.pair_id) == (f"p{index}", f"line {index}", index // 2)
        assert sample.answer_label == sample.labels[0] == index % 2
        assert decode(tokenizers["bytes"], sample.input_ids) == f"the {index}\ncat<eos>"


def test_dropped_records_are_counted_and_the_first_is_named(tokenizers):
    records = [record("Q", ["a" * length]) for length in (1, 20, 1, 30)]
    samples, dropped = tokenise(records, tokenizers["characters"], max_len=10)
    assert len(samples) == 2
    assert str(dropped) == "2 longer than --data.max_len (first: data.jsonl line 1)"
