"""Layouts of compared answers: which side is better, where the prompt ends, and what is refused."""

import pytest

from pipa_openrlhf.data.dataset import TIES, load_samples
from pipa_openrlhf.data.tokenise import tokenise
from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(read_records):
    """Layout, and the prompt and the two texts of the pair, chosen first."""

    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        if not records:
            return name, None
        chosen, rejected = records
        assert (chosen.side, chosen.answer_label, rejected.side, rejected.answer_label) == (1, 1, 0, 0)
        assert chosen.prompt == rejected.prompt and chosen.pair_id == rejected.pair_id == 0
        return name, (chosen.prompt, *chosen.steps, *rejected.steps)

    return read


TWO = {
    "helpsteer2": ("response_1", "response_2", "preference_strength"),
    "helpsteer3": ("response1", "response2", "overall_preference"),
    "pku": ("response_0", "response_1", "better_response_id"),
    "halos": ("output_A", "output_B", "label"),
    "shp": ("human_ref_A", "human_ref_B", "labels"),
    "arena": ("response_a", "response_b", "winner"),
}


@pytest.mark.parametrize(
    "data, value, better",
    [
        *[("helpsteer2", value, int(value > 0)) for value in (-3, -1, 1, 3)],
        *[("helpsteer3", value, int(float(value) > 0)) for value in (-2, 2.0, "-1")],
        *[("helpsteer2", 0, None), ("helpsteer3", 0, None)],
        *[("pku", 0, 0), ("pku", 1, 1)],
        *[("halos", 1, 0), ("halos", 0, 1), ("shp", 1, 0), ("shp", 0, 1)],
        *[("arena", "model_a", 0), ("arena", "model_b", 1), ("arena", "tie (bothbad)", None)],
    ],
)
def test_the_better_one_by_its_column(read, data, value, better):
    first, second, column = TWO[data]
    name, found = read({"prompt": "Q", first: "A", second: "B", column: value})
    assert name == "compared"
    assert found == (None if better is None else ("Q", *("AB", "BA")[better]))


@pytest.mark.parametrize(
    "data, value", [("helpsteer2", 4), ("helpsteer2", "much"), ("helpsteer3", True), ("pku", 2), ("arena", "nobody")]
)
def test_other_values_are_refused(read, data, value):
    first, second, column = TWO[data]
    with pytest.raises(UserError, match=f"^data.jsonl line 1: '{column}' is "):
        read({"prompt": "Q", first: "A", second: "B", column: value})


def test_scores_that_say_the_opposite_are_refused(read):
    row = {"prompt": "Q", "output_A": "A", "output_B": "B", "label": 1}
    assert read({**row, "reward_A": 0.7, "reward_B": 0.2})[1] == ("Q", "A", "B")
    assert read({**row, "reward_A": 0.2, "reward_B": 0.2})[1] is None
    with pytest.raises(UserError, match="line 1: 'label' contradicts 'reward_A' and 'reward_B'; correct one of them"):
        read({**row, "reward_A": 0.2, "reward_B": 0.7})


def test_ties_are_counted(make_args, tokenizers, write_rows):
    rows = [{"prompt": "the", "response_1": "cat", "response_2": "mat", "preference_strength": n} for n in (0, 1)]
    loaded = load_samples(make_args(), tokenizers["bytes"], dataset=write_rows(rows))
    assert loaded.dropped == {TIES: 1} and len(loaded.samples) == 2


def test_the_best_against_the_worst_of_a_ranking(read):
    answers = [{"answer": "m", "rank": 2.0}, {"answer": "w", "rank": 7}, {"answer": "b", "rank": 1}]
    assert read({"prompt": "Q", "answers": answers}) == ("ranked", ("Q", "b", "w"))
    ranked = [{"rank": 1, "completion": [assistant("B")]}, {"rank": 0, "completion": [assistant("A")]}]
    assert read({"context": [USER], "completions": ranked}, apply_chat_template=True) == ("ranked", ([USER], "A", "B"))
    assert read({"prompt": "Q", "answers": [{"answer": "m", "rank": 1}] * 2}) == ("ranked", None)
    with pytest.raises(UserError, match="'answers\\[1\\].rank' is 'x'; a rank is a number"):
        read({"prompt": "Q", "answers": [{"answer": "m", "rank": 1}, {"answer": "n", "rank": "x"}]})


@pytest.mark.parametrize(
    "row, flags",
    [
        ({"instruction": "Q", "chosen_response": "A", "rejected_response": "B", "chosen_avg_rating": 1.0}, {}),
        ({"question": "Q", "response": "A", "rejected_response": "B"}, {}),
        ({"question": "Q", "response_k": "B", "response_j": "A"}, {}),
        ({"prompt": "Q", "chosen": None, "rejected": None, "response_k": "B", "response_j": "A"}, {}),
        ({"query": "Q", "response": "A", "rejected_response": "B", "history": []}, {}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 1.0, "score_rejected": 2.0}, {}),
        (
            {
                "input": {"messages": [USER]},
                "preferred_output": [assistant("A")],
                "non_preferred_output": [assistant("B")],
            },
            {"apply_chat_template": True},
        ),
        ({"messages": [USER, assistant("A")], "rejected_response": "B"}, {"apply_chat_template": True}),
        (
            {"messages": [USER, assistant("A")], "rejected_messages": [USER, assistant("B")]},
            {"apply_chat_template": True},
        ),
        ({"messages": [USER], "chosen": assistant("A"), "rejected": assistant("B")}, {"apply_chat_template": True}),
        (
            {"prompt": "Q", "chosen": [USER, assistant("A")], "rejected": [USER, assistant("B")], "messages": [USER]},
            {"apply_chat_template": True},
        ),
    ],
)
def test_names_of_the_two_sides(read, row, flags):
    assert read(row, **flags) == ("paired", ([USER] if flags else "Q", "A", "B"))


def test_turns_of_the_assistant_before_the_answer_are_its_context(read):
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "hm"}, {"from": "user", "value": "go on"}]
    _, (prompt, *_) = read({"trajectory": turns, "chosen": "A", "rejected": "B"}, apply_chat_template=True)
    assert prompt == [USER, assistant("hm"), {"role": "user", "content": "go on"}]


def test_key_flags_do_not_overrule_a_column_that_compares(read):
    row = {"prompt": "Q", "good_one": "A", "bad_one": "B", "overall_preference": 2}
    keys = {"chosen_key": "good_one", "rejected_key": "bad_one"}
    with pytest.raises(UserError, match="'overall_preference' may say which of 'good_one' and 'bad_one' is better"):
        read(row, **keys)
    assert read(row, **keys, format="paired")[1] == ("Q", "A", "B")
    with pytest.raises(UserError, match="'Winner' may say which"):
        read({"prompt": "Q", "good_one": "A", "bad_one": "B", "Winner": "x"}, **keys)
    keys = {"chosen_key": "response1", "rejected_key": "response2"}
    with pytest.raises(UserError, match="'overall_preference' may say which of 'response1' and 'response2' is bet"):
        read({"prompt": "Q", "response1": "A", "response2": "B", "overall_preference": 2}, **keys)


@pytest.mark.parametrize("index", ["better_response_id", "safer_response_id"])
def test_key_flags_would_turn_some_rows_of_pku_round(read, index):
    keys = {"chosen_key": "response_0", "rejected_key": "response_1"}
    with pytest.raises(UserError, match=f"^data.jsonl: '{index}' may say which of 'response_0' and 'response_1' is"):
        read({"prompt": "Q", "response_0": "A", "response_1": "B", index: 1}, **keys)


def test_what_does_not_compare_beside_key_flags(read):
    row = {"better_question": "Q", "good": "A", "bad": "B", "preference": None, "rejected_labels": [0]}
    keys = {"chosen_key": "good", "rejected_key": "bad", "prompt_key": "better_question"}
    assert read(row, **keys) == ("paired", ("Q", "A", "B"))


@pytest.mark.parametrize(
    "beside",
    [
        {"response_1": "A", "response_2": "B", "preference_strength": 3},
        {"answers": [{"answer": "B", "rank": 1}, {"answer": "A", "rank": 2}]},
    ],
)
def test_columns_that_name_the_sides_go_before_a_comparison(read, beside):
    assert read({"prompt": "Q", "chosen": "A", "rejected": "B", **beside}) == ("paired", ("Q", "A", "B"))


HELLO = "\n\nHuman: Hi\n\nAssistant:"
SUM = "\n\nHuman: 1+1?\n\nAssistant:"
TURNS = [{"role": "user", "content": "Hi"}, assistant("Hello."), {"role": "user", "content": "1+1?"}]
PARTED = "line 1: 'chosen' and 'rejected' part in a user's turn; let them part in the assistant's"
CHAT = {"apply_chat_template": True}


@pytest.mark.parametrize("answer", [" Go!", f" Hello.{SUM} No"])
def test_what_the_human_says_after_sides_part_is_masked(read_records, answer):
    row = {"chosen": f"{HELLO} Well.{SUM} Two{SUM} 2", "rejected": f"{HELLO}{answer}"}
    _, (chosen, rejected) = read_records([row])
    assert chosen.prompt == rejected.prompt == HELLO
    # " Well." has 6 characters, " Two" 4, SUM 2 + 6 + 5 + 12 = 25: the human's turn with the mark that follows.
    assert chosen.masked_spans == ((0, 6, 31), (0, 35, 60))
    assert rejected.masked_spans == (((0, 7, 32),) if SUM in answer else ())


@pytest.mark.parametrize("flags", [{}, CHAT])
def test_no_token_of_the_human_is_labelled(read_records, tokenizers, chat, flags):
    row = {"chosen": f"{HELLO} Well.{SUM} Two", "rejected": f"{HELLO} Go!"}
    _, records = read_records([row], **flags)
    tokenizer = chat if flags else tokenizers["bytes"]
    samples, dropped = tokenise(records, tokenizer, max_len=999)
    assert not dropped.counts
    for sample, said in zip(samples, (" Well. Two", " Go!"), strict=True):
        ids = sample.input_ids[sample.prompt_len :][sample.mask == 1]
        labelled = tokenizer.decode(ids, skip_special_tokens=True)
        assert "1+1" not in labelled and "Human" not in labelled
        assert labelled.replace(" ", "").replace("\n", "") == said.replace(" ", "")


def test_a_dialogue_as_text_becomes_messages(read):
    row = {"chosen": f"{HELLO} Hello.{SUM} Two, yes.", "rejected": f"{HELLO} Hello.{SUM} Two, no."}
    assert read(row) == ("paired", (f"{HELLO} Hello.{SUM}", " Two, yes.", " Two, no."))
    assert read(row, **CHAT) == ("paired", (TURNS, "Two, yes.", "Two, no."))
    answers = [{"answer": "3", "rank": 2}, {"answer": "2", "rank": 1}]
    prompt = f"{HELLO} Hello.{SUM} "
    assert read({"prompt": prompt, "answers": answers}) == ("ranked", (prompt, "2", "3"))
    assert read({"prompt": prompt, "answers": answers}, **CHAT) == ("ranked", (TURNS, "2", "3"))


@pytest.mark.parametrize("flags", [{}, CHAT])
def test_sides_that_part_in_a_turn_of_the_human(read, flags):
    text = HELLO + " Hello.\n\nHuman: {}\n\nAssistant: Two"
    with pytest.raises(UserError, match=PARTED):
        read({"chosen": text.format("1+1?"), "rejected": text.format("2+0?")}, **flags)


def test_marks_that_begin_no_dialogue(read, read_records):
    # No turn of the model follows "### Input:", so that the text goes on as any other: to the last common space.
    texts = {"chosen": "### Input: 1+1 is 2", "rejected": "### Input: 1+1 is 3"}
    assert read(texts)[1] == ("### Input: 1+1 is", " 2", " 3")
    row = {"chosen": f"{HELLO} Write ### Input: x", "rejected": f"{HELLO} Go!"}
    assert all(one.masked_spans == () for one in read_records([row])[1])


def test_first_turns_that_differ(read):
    rows = [f"\n\nHuman: {first}\n\nAssistant: Two" for first in ("1+1?", "2+0?")]
    with pytest.raises(UserError, match=PARTED):
        read({"chosen": rows[0], "rejected": rows[1]})


@pytest.mark.parametrize("flags, problem", [({}, "ends with a user's turn"), (CHAT, "ends with a user message")])
def test_a_dialogue_that_ends_with_the_human(read, flags, problem):
    with pytest.raises(UserError, match=f"line 1: 'chosen' {problem}; end with the assistant's"):
        read({"chosen": f"{HELLO} Well.\n\nHuman: bye", "rejected": f"{HELLO} Go!"}, **flags)


def test_messages_that_part_in_a_turn_of_the_user(read):
    again = [{"role": "user", "content": text} for text in ("more", "less")]
    chosen, rejected = ([USER, assistant("A"), one, assistant("B")] for one in again)
    with pytest.raises(UserError, match=PARTED):
        read({"chosen": chosen, "rejected": rejected}, **CHAT)
    # One that goes on where the other ends is a better or worse answer to the same.
    assert read({"chosen": chosen, "rejected": chosen[:2]}, **CHAT)[1] == ([USER], "B", "A")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
        "<|user|>\nQ</s>\n<|assistant|>\n",
        "<s>[INST] Q [/INST]",
        "### Instruction:\nQ\n\n### Response:\n",
    ],
)
def test_texts_that_a_chat_template_wrote(read, read_records, prompt):
    texts = {"chosen": f"{prompt}It is 2", "rejected": f"{prompt}It is 3"}
    assert read({**texts, "system": "S"}) == ("paired", (prompt, "It is 2", "It is 3"))
    _, (chosen, _) = read_records([{**texts, "chosen": f"{prompt}Well {prompt}no"}])
    ((_, start, end),) = chosen.masked_spans
    assert (chosen.prompt, chosen.steps[0][:start].rstrip(), chosen.steps[0][end:]) == (prompt, "Well", "no")
    with pytest.raises(UserError, match="'rejected' ends where its answer should begin"):
        read({**texts, "rejected": prompt})


@pytest.mark.parametrize(
    "prompt, before",
    [
        ([USER], []),
        ([TURNS[2]], []),
        ([SYSTEM], [SYSTEM]),
        ([SYSTEM, USER], [SYSTEM]),
        ([USER, assistant("A"), USER], [USER, assistant("A")]),
        ([USER, assistant("A")], [USER, assistant("A")]),
    ],
)
def test_what_whole_conversations_share_is_the_prompt_beside_another(read, prompt, before):
    shared = [USER, *TURNS[1:]]
    row = {"prompt": prompt, "chosen": [*shared, assistant("2")], "rejected": [*shared, assistant("3")]}
    assert read(row, **CHAT)[1] == ([*before, *shared], "2", "3")
    other = [{"role": "user", "content": "other"}]
    with pytest.raises(UserError, match="line 1: the conversations of the two sides do not go on from the prompt's"):
        read({**row, "prompt": other}, **CHAT)


def test_a_system_text_beside_whole_conversations(read):
    row = {"system": "S", "chosen": [USER, assistant("A")], "rejected": [USER, assistant("B")]}
    assert read(row, **CHAT)[1] == ([SYSTEM, USER], "A", "B")
    own = {"role": "system", "content": "own"}
    whole = {name: [own, *row[name]] for name in ("chosen", "rejected")}
    assert read({**row, **whole}, **CHAT)[1] == ([own, USER], "A", "B")
    texts = {"chosen": f"{HELLO} Well", "rejected": f"{HELLO} Go"}
    assert read({"system": "S", **texts})[1] == (f"S{HELLO}", " Well", " Go")
    assert read({"system_prompt": "S", **texts}, **CHAT)[1] == ([SYSTEM, TURNS[0]], "Well", "Go")
    with pytest.raises(UserError, match="2 of 2 answers have an empty prompt"):
        read({"system": "S", "chosen": "A", "rejected": "B"})


SAMPLE_FILES = {
    "helpsteer2_preference.jsonl": ("compared", False),
    "helpsteer3_preference.jsonl": ("compared", True),
    "halos_pairwise_feedback.json": ("compared", True),
    "pku_safe_rlhf.jsonl": ("compared", False),
    "axolotl_nectar.jsonl": ("ranked", False),
    "nemo_rl_preference.jsonl": ("ranked", True),
    "nemo_aligner_dummy_dpo.jsonl": ("paired", False),
    "ms_swift_dpo.jsonl": ("paired", True),
    "orca_dpo_pairs.jsonl": ("paired", False),
    "openai_preference.jsonl": ("paired", True),
    "llamafactory_dpo_en_demo.json": ("paired", True),
    "ultrafeedback_binarized_h4.jsonl": ("paired", True),
    "ultrafeedback_argilla.jsonl": ("paired", False),
    "ultrainteract_pair.jsonl": ("paired", True),
    "tulu3_pref_mix.jsonl": ("paired", True),
    "trl_preference_conv_implicit.jsonl": ("paired", True),
    "openrlhf_preference_mixture2.jsonl": ("paired", True),
}


@pytest.mark.parametrize("file", SAMPLE_FILES)
def test_samples(read_records, sample_rows, file):
    layout, chat = SAMPLE_FILES[file]
    name, records = read_records(sample_rows(file), apply_chat_template=chat)
    assert name == layout and len(records) >= 2
    chosen, rejected = records[:2]
    assert chosen.prompt and chosen.prompt == rejected.prompt and chosen.steps != rejected.steps
    # The samples that were written by hand have the right sum on the better side.
    if "rolls" in str(chosen.prompt):
        assert "40" in chosen.steps[-1] and "32" in rejected.steps[-1]
