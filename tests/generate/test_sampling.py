"""Sampling with a tiny model: batching, padding, ends and seeds must not change what an answer is."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from pipa_openrlhf.generate import sampling
from pipa_openrlhf.generate.sampling import SamplingSettings, end_tokens, plan_batches, sample_batches, shared_tokens

PROMPTS = ["12 + 7?\n", "a much longer prompt than the others: 3 * 4?\n", "x", "19 * 3?\n"]


def make_tokenizer():
    """One token a byte; 256 is the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def parts():
    return make_model(), make_tokenizer()


def run(parts, settings, batches=None, prompts=PROMPTS):
    answers = {}
    batches = plan_batches(prompts, settings) if batches is None else batches
    for batch, found in sample_batches(*parts, prompts, batches, settings):
        answers.update(zip(batch, found, strict=True))
    return answers


def greedy_by_hand(parts, prompt, max_new_tokens):
    model, tokenizer = parts
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    new = []
    while len(new) < max_new_tokens and 256 not in new:
        with torch.no_grad():
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode([token for token in new if token != 256])


@pytest.mark.parametrize("batch_size", [1, 3, 96])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_greedy_answers_do_not_depend_on_batch_padding_or_shared_prompt_pass(parts, batch_size, num_samples):
    settings = SamplingSettings(num_samples=num_samples, max_new_tokens=12, batch_size=batch_size)
    answers = run(parts, settings)
    for index, prompt in enumerate(PROMPTS):
        assert [answer.text for answer in answers[index]] == [greedy_by_hand(parts, prompt, 12)] * num_samples


SHOTS = "2 + 2?\n4\n\n3 + 1?\n4\n\n"
# Lengths a few tokens apart: every row keeps some of what is shared, at another place.
NEAR = ["5?\n", "12 + 7?\n", "19 * 345?\n", "3 - 1?\n"]
LONG = "a question that is longer than all that stands before it, so that some rows keep nothing of what is shared?\n"


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize(
    "prompts",
    [
        [SHOTS + prompt for prompt in NEAR],
        [SHOTS + prompt for prompt in PROMPTS],
        [SHOTS, SHOTS + "5?\n"],
        [SHOTS] * 2,
        [SHOTS + LONG, SHOTS + "5?\n", SHOTS + LONG[30:]],
    ],
)
def test_what_prompts_begin_with_is_computed_once_and_changes_no_answer(parts, num_samples, prompts):
    model, tokenizer = parts
    computed = []

    def note(_module, _args, inputs):
        computed.append(inputs["input_ids"].numel())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    answers = run(parts, SamplingSettings(num_samples=num_samples, max_new_tokens=12), prompts=prompts)
    handle.remove()
    for index, prompt in enumerate(prompts):
        assert [answer.text for answer in answers[index]] == [greedy_by_hand(parts, prompt, 12)] * num_samples
    shared = shared_tokens([tokenizer(prompt).input_ids for prompt in prompts])
    rectangle = len(prompts) * max(map(len, prompts))
    drawn = 12 * len(prompts) * num_samples  # the last prompt token of each sample among them
    assert shared >= len(SHOTS) - 1 and sum(computed) <= rectangle - (len(prompts) - 1) * shared + drawn


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([[1] * 20 + [2], [1] * 20 + [3, 4]], 20),
        ([[1] * 20, [1] * 20], 19),
        ([[1] * 17, [1] * 30], 16),
        ([[1] * 16, [1] * 30], 0),
        ([[1] * 15 + [2], [1] * 15 + [3]], 0),
        ([[1] * 40], 0),
        ([[5] * 20 + [1], [5] * 20 + [9], [5] * 18 + [7] * 9], 18),
    ],
)
def test_shared_tokens(prompts, shared):
    assert shared_tokens(prompts) == shared


SMALL = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256, "initializer_range": 0.3}
LLAMA_LIKE = SMALL | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIGS = {
    "a window of columns": MistralConfig(**LLAMA_LIKE, sliding_window=8),
    "local layers by columns": GPTNeoConfig(
        **SMALL, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=24
    ),
    "distances of columns": MptConfig(**SMALL, d_model=32, n_heads=2, n_layers=2, max_seq_len=256),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_look_at_columns_answer_as_one_by_one(name):
    torch.manual_seed(0)
    parts = AutoModelForCausalLM.from_config(CONFIGS[name]).eval(), make_tokenizer()
    prompts = [SHOTS + prompt for prompt in NEAR]
    answers = run(parts, SamplingSettings(max_new_tokens=12), prompts=prompts)
    for index, prompt in enumerate(prompts):
        assert answers[index][0].text == greedy_by_hand(parts, prompt, 12)


def test_every_prompt_is_in_one_batch_longest_first():
    settings = SamplingSettings(num_samples=3, batch_size=6)
    assert plan_batches(PROMPTS, settings) == [[1, 0], [3, 2]]
    assert plan_batches(PROMPTS, SamplingSettings(num_samples=8, batch_size=4)) == [[1], [0], [3], [2]]


def test_a_batch_draws_the_same_whatever_ran_before_it(parts):
    settings = SamplingSettings(num_samples=2, temperature=1.0, max_new_tokens=8, batch_size=4, seed=3)
    batches = plan_batches(PROMPTS, settings)
    whole = run(parts, settings)
    torch.manual_seed(99)
    continued = run(parts, settings, batches[1:])
    assert continued == {index: whole[index] for index in batches[1]}
    other = run(parts, SamplingSettings(num_samples=2, temperature=1.0, max_new_tokens=8, batch_size=4, seed=4))
    assert other != whole


def test_samples_of_a_prompt_differ(parts):
    settings = SamplingSettings(num_samples=8, temperature=1.0, max_new_tokens=8, batch_size=32)
    assert len({answer.text for answer in run(parts, settings)[0]}) > 4


def test_sampling_follows_the_models_distribution(parts):
    """All of the vocabulary is open: generate()'s own top-50 default would cut it."""
    model, tokenizer = parts
    settings = SamplingSettings(num_samples=4000, temperature=2.0, max_new_tokens=1, batch_size=4000)
    drawn = torch.zeros(257)
    _, (answers,) = next(sample_batches(model, tokenizer, PROMPTS, [[0]], settings))
    ends = sum(answer.finished for answer in answers)
    with torch.no_grad():
        logits = model(tokenizer(PROMPTS[0], return_tensors="pt").input_ids).logits[0, -1]
    probabilities = (logits / 2.0).softmax(-1)
    for answer in answers:
        if len(answer.text) == 1 and answer.text.isascii():
            drawn[tokenizer(answer.text).input_ids[0]] += 1
    ascii_tokens = torch.tensor([tokenizer(chr(code)).input_ids[0] for code in range(128)])
    expected = probabilities[ascii_tokens] * 4000
    assert ((drawn[ascii_tokens] - expected).abs() < 5 * expected.sqrt() + 5).all()
    assert abs(ends - 4000 * probabilities[256]) < 5 * (4000 * probabilities[256]).sqrt() + 5


def test_an_answer_ends_at_any_published_end_token(parts):
    model, tokenizer = make_model(), parts[1]
    settings = SamplingSettings(max_new_tokens=12, batch_size=1)
    text = run((model, tokenizer), settings)[0][0].text
    assert not run((model, tokenizer), settings)[0][0].finished
    model.generation_config.eos_token_id = [256, tokenizer(text[3]).input_ids[0]]
    assert len(end_tokens(model.generation_config, tokenizer)) == 2
    cut = run((model, tokenizer), settings)[0][0]
    assert cut.finished and cut.text == text[: text.index(text[3])]
    assert cut.num_tokens == len(cut.text) + 1


def test_settings_published_with_a_model_do_not_leak_in(parts):
    model, tokenizer = make_model(), parts[1]
    settings = SamplingSettings(max_new_tokens=12)
    plain = run((model, tokenizer), settings)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    assert run((model, tokenizer), settings) == plain
    model.generation_config.top_k = 1
    drawn = SamplingSettings(num_samples=8, temperature=1.0, max_new_tokens=8, batch_size=32)
    assert len({answer.text for answer in run((model, tokenizer), drawn)[0]}) > 4


def test_rows_that_have_ended_leave_the_batch_and_change_no_answer(parts, monkeypatch):
    """Ends come at many places; each row of each pass through the model is counted."""
    model, tokenizer = make_model(), parts[1]
    model.generation_config.eos_token_id = list(range(0, 257, 12))
    settings = SamplingSettings(num_samples=8, temperature=1.0, max_new_tokens=60, batch_size=32)
    computed = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, inputs: computed.append(len(inputs["input_ids"])), with_kwargs=True
    )
    answers = run((model, tokenizer), settings)
    leaving, _ = sum(computed), computed.clear()
    lengths = [answer.num_tokens for of_prompt in answers.values() for answer in of_prompt]
    at_a_time = sampling._TOKENS_AT_A_TIME
    monkeypatch.setattr(sampling, "_TOKENS_AT_A_TIME", 60)
    assert run((model, tokenizer), settings) == answers
    handle.remove()
    assert max(lengths) > 2 * at_a_time and min(lengths) < at_a_time
    assert leaving <= sum(-(-length // at_a_time) * at_a_time for length in lengths) + len(PROMPTS)
    assert sum(computed) >= len(lengths) * max(lengths) > leaving


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_leave_models_that_look_at_columns(name):
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(CONFIGS[name]).eval(), make_tokenizer()
    whole = run((model, tokenizer), SamplingSettings(max_new_tokens=40, batch_size=1))
    written = [answer.token_ids for (answer,) in whole.values() if answer.token_ids]
    model.generation_config.eos_token_id = [256, *(ids[len(ids) // 2] for ids in written[:2])]
    alone = run((model, tokenizer), SamplingSettings(max_new_tokens=40, batch_size=1))
    together = run((model, tokenizer), SamplingSettings(max_new_tokens=40))
    assert together == alone and len({answer.num_tokens for (answer,) in alone.values()}) > 1


def test_what_ends_an_answer_begins_in_it(parts):
    """The prompt's last character and the answer's first would be a stop text."""
    plain = run(parts, SamplingSettings(max_new_tokens=30))
    for index, (answer,) in plain.items():
        stop = PROMPTS[index][-1] + answer.text[0]
        cut = run(parts, SamplingSettings(max_new_tokens=30, stop=stop), batches=[[index]])[index][0]
        assert cut.text == answer.text.partition(stop)[0] and cut.finished == (answer.finished or stop in answer.text)


@pytest.mark.parametrize("at_a_time", [1, 5, 16])
def test_an_answer_ends_before_a_stop_text_wherever_slices_end(parts, monkeypatch, at_a_time):
    monkeypatch.setattr(sampling, "_TOKENS_AT_A_TIME", at_a_time)
    plain = run(parts, SamplingSettings(max_new_tokens=30))
    texts = {index: answer.text for index, (answer,) in plain.items()}
    stop = texts[0][9:12]
    assert len(stop) == 3
    cut = run(parts, SamplingSettings(max_new_tokens=30, stop=stop))
    for index, (answer,) in cut.items():
        assert answer.text == texts[index].partition(stop)[0]
        assert answer.finished == (plain[index][0].finished or stop in texts[index])
    assert cut[0][0].finished and cut[0][0].num_tokens <= 12


def test_a_model_with_a_state_in_itself_keeps_all_rows_to_the_end(monkeypatch):
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(**LLAMA_LIKE | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=64)
    model = RecurrentGemmaForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(0, 257, 12))
    prompts = [PROMPTS[0], PROMPTS[3]] * 8  # of one length: it has no mask for its state
    assert len({len(prompt) for prompt in prompts}) == 1
    settings = SamplingSettings(temperature=1.0, max_new_tokens=60)
    answers = run((model, make_tokenizer()), settings, prompts=prompts)
    monkeypatch.setattr(sampling, "_TOKENS_AT_A_TIME", 60)
    assert run((model, make_tokenizer()), settings, prompts=prompts) == answers
    assert len({answer.num_tokens > 16 for (answer,) in answers.values()}) == 2


def test_a_model_that_keeps_something_else_answers_all_the_same(parts, monkeypatch):
    settings = SamplingSettings(max_new_tokens=40)
    expected = run(parts, settings)
    monkeypatch.setattr(sampling, "_layers", lambda model: {object})
    assert run(parts, settings) == expected
