"""Chat templates: prompt and steps are found in the rendered text, and nothing follows the last eos."""

import dataclasses

import pytest

from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import tokenise

USER = {"role": "user", "content": "Q"}
PROMPT = "<|user|>\nQ\n<|assistant|>\n"


def record(steps, labels=None, **more) -> Record:
    return Record([USER], list(steps), labels, 1, "p", "data.jsonl line 1", **more)


def one(tokenizer, item: Record):
    annotation = "step" if item.step_labels else "answer"
    samples, dropped = tokenise([item], tokenizer, max_len=1000, annotation=annotation)
    assert len(samples) + dropped.counts.total() == 1
    return samples[0] if samples else next(iter(dropped.counts))


def texts(tokenizer, sample) -> list[str]:
    """Prompt, then each step."""
    answer = sample.input_ids[sample.prompt_len :]
    parts = [sample.input_ids[: sample.prompt_len]]
    parts += [answer[sample.step_ids == step] for step in range(sample.step_ids.max() + 1)]
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in parts]


def test_answer_ends_at_the_templates_eos(chat):
    assert texts(chat, one(chat, record(["a b"]))) == [PROMPT, "a b<eos>"]


def test_steps_share_one_assistant_message(chat):
    sample = one(chat, record(["ab", "c"], [1, 0]))
    assert texts(chat, sample) == [PROMPT, "ab\n", "c<eos>"]
    assert sample.labels.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("steps, labels", [(["ab<eos>"], None), (["x", "ab<eos>"], [1, 0])])
def test_eos_in_the_content_is_not_doubled(chat, steps, labels):
    sample = one(chat, record(steps, labels))
    assert texts(chat, sample)[-1] == "ab<eos>"


def test_given_messages_are_the_answer_up_to_the_last_eos(chat):
    messages = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "b<eos>"},
    ]
    sample = one(chat, record(["b"], messages=messages))
    assert texts(chat, sample) == [PROMPT, "a<eos>\n<|user|>\nu\n<|assistant|>\nb<eos>"]
    assert set(sample.step_ids.tolist()) == {0}


def test_what_the_template_adds_goes_to_the_first_and_last_step(chat):
    chat.chat_template = chat.chat_template.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}[[{{ m['content'] }}]]{% else %}{{ m['content'] }}{% endif %}",
    )
    sample = one(chat, record(["ab", "c"], [1, 0]))
    assert texts(chat, sample) == [PROMPT, "[[ab\n", "c]]<eos>"]
    assert texts(chat, one(chat, record(["ab"]))) == [PROMPT, "[[ab]]<eos>"]


def test_masked_text_moves_with_what_the_template_adds(chat):
    chat.chat_template = chat.chat_template.replace("{{ m['content'] }}", "((({{ m['content'] }}")
    sample = one(chat, record(["abc", "def"], [1, 0], masked_spans=((0, 1, 2), (1, 0, 2))))
    answer = sample.input_ids[sample.prompt_len :]
    assert chat.decode(answer[sample.mask == 0]) == "bde"
    single = one(chat, record(["abc"], masked_spans=((0, 1, 2),)))
    assert chat.decode(single.input_ids[single.prompt_len :][single.mask == 0]) == "b"


@pytest.mark.parametrize("content", ["e", "o", "<", "eos>", "\n", "assistant"])
def test_content_that_also_stands_in_what_the_template_writes(chat, content):
    assert texts(chat, one(chat, record([content]))) == [PROMPT, f"{content}<eos>"]


def test_eos_between_turns_only_gets_one_at_the_end(chat):
    chat.chat_template = chat.chat_template.replace(
        "{% if m['role'] == 'assistant' %}<eos>", "{% if m['role'] == 'user' %}<eos>"
    )
    answers = [{"role": "assistant", "content": "b"}, USER, {"role": "assistant", "content": "b"}]
    sample = one(chat, record(["b"], messages=answers))
    prompt = "<|user|>\nQ<eos>\n<|assistant|>\n"
    assert texts(chat, sample) == [prompt, "b\n<|user|>\nQ<eos>\n<|assistant|>\nb\n<eos>"]


def test_the_last_eos_of_the_template_counts(chat):
    chat.chat_template = chat.chat_template.replace("<eos>", "<eos>x<eos>y")
    assert texts(chat, one(chat, record(["a"]))) == [PROMPT, "a<eos>x<eos>"]


def test_a_template_without_eos_gets_one(chat):
    chat.chat_template = chat.chat_template.replace("<eos>", "")
    assert texts(chat, one(chat, record(["a"]))) == [PROMPT, "a\n<eos>"]


def test_a_template_that_trims_a_plain_answer_is_followed(chat):
    chat.chat_template = chat.chat_template.replace("m['content']", "m['content'] | trim")
    assert texts(chat, one(chat, record([" a "]))) == [PROMPT, "a<eos>"]


def test_a_template_that_trims_steps_drops_the_record(chat):
    chat.chat_template = chat.chat_template.replace("m['content']", "m['content'] | trim")
    assert one(chat, record([" a", "b"], [1, 1])) == "the chat template rewrites the steps"
    assert texts(chat, one(chat, record(["a", "b"], [1, 1]))) == [PROMPT, "a\n", "b<eos>"]


def test_a_generation_prompt_that_the_full_text_lacks_drops_the_record(chat):
    chat.chat_template = chat.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>"
    )
    assert one(chat, record(["a"])) == "the chat template rewrites the prompt"


def test_a_template_that_refuses_the_messages_drops_the_record(chat):
    chat.chat_template = "{{ raise_exception('no system role') }}"
    assert one(chat, record(["a"])) == "the chat template refuses the messages: no system role"


def test_multi_turn_prompt(chat):
    prompt = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "A"}, USER]
    sample = one(chat, dataclasses.replace(record(["a"]), prompt=prompt))
    head = "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA<eos>\n<|user|>\nQ\n<|assistant|>\n"
    assert texts(chat, sample) == [head, "a<eos>"]
