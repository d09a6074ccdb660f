"""Layouts of compared answers: which side is better, where the prompt ends, and what is refused."""

import pytest

from pipa_openrlhf.data.dataset import TIES, load_samples
from pipa_openrlhf.data.tokenise import tokenise
from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}


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
    table = {"answer": ["b", "a"], "rank": [2, 1]}
    assert read({"prompt": "Q", "answers": table}) == ("ranked", ("Q", "a", "b"))
    assert read({"prompt": "Q", "answers": [{"answer": "m", "rank": 1}] * 2}) == ("ranked", None)
    with pytest.raises(UserError, match="'answers\\[1\\].rank' is 'x'; a rank is a number"):
        read({"prompt": "Q", "answers": [{"answer": "m", "rank": 1}, {"answer": "n", "rank": "x"}]})


@pytest.mark.parametrize(
    "row, flags",
    [
        ({"instruction": "Q", "chosen_response": "A", "rejected_response": "B", "chosen_avg_rating": 1.0}, {}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 1.0, "score_rejected": 2.0}, {}),
        (
            {
                "input": {"messages": [USER]},
                "preferred_output": [assistant("A")],
                "non_preferred_output": [assistant("B")],
            },
            {"apply_chat_template": True},
        ),
        ({"question": "Q", "response_j": "A", "response_k": "B"}, {}),
        ({"query": "Q", "response": "A", "rejected_response": "B"}, {}),
        ({"prompt": "Q", "chosen": None, "rejected": None, "chosen_response": "A", "rejected_response": "B"}, {}),
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


class TestSummaries:
    ROW = {"info": {"id": "x", "post": "Q", "title": "t", "article": None}, "choice": 1, "worker": "w"}
    ROW = {**ROW, "summaries": [{"text": " B", "policy": "p"}, {"text": " A", "policy": "q"}]}

    def test_the_better_one_by_its_number(self, read):
        assert read(self.ROW) == ("summaries", ("Q", " A", " B"))
        assert read({**self.ROW, "choice": 0})[1] == ("Q", " B", " A")
        article = {"post": None, "article": "R"}
        assert read({**self.ROW, "info": article}, input_template="{}\n\nTL;DR:")[1] == ("R\n\nTL;DR:", " A", " B")

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"choice": 2}, "'choice' is 2; give 0 or 1, or remove the row"),
            ({"info": {"post": None}}, "'info.post' must be text, it is null"),
            ({"summaries": [{"text": "A"}, {"text": ""}]}, "'summaries\\[1\\].text' is empty"),
        ],
    )
    def test_bad_rows(self, read, change, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read({**self.ROW, **change})


def test_turns_of_the_assistant_before_the_answer_are_its_context(read):
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "hm"}, {"from": "user", "value": "go on"}]
    _, (prompt, *_) = read({"trajectory": turns, "chosen": "A", "rejected": "B"}, apply_chat_template=True)
    assert prompt == [USER, assistant("hm"), {"role": "user", "content": "go on"}]


@pytest.mark.parametrize(
    "other", ["overall_preference", "better_response_id", "Winner", "choice", "label", "labels", "safer_or_better"]
)
def test_key_flags_do_not_overrule_a_column_that_compares(read, other):
    row = {"prompt": "Q", "response_0": "A", "response_1": "B", other: 1}
    keys = {"chosen_key": "response_0", "rejected_key": "response_1"}
    problem = f"--data.chosen_key response_0 and --data.rejected_key response_1 say which .* but so may '{other}'"
    with pytest.raises(UserError, match=f"^data.jsonl: {problem}, row by row; leave these flags out if it does, or"):
        read(row, **keys)
    assert read(row, **keys, format="paired")[1] == ("Q", "A", "B")


def test_columns_that_compare_nothing_do_not_count(read):
    row = {"better_question": "Q", "preferred": "A", "better": None, "worse": "B", "labeler": "x"}
    flags = {"chosen_key": "preferred", "rejected_key": "worse", "prompt_key": "better_question"}
    assert read(row, **flags) == ("paired", ("Q", "A", "B"))


def test_names_of_the_sides_go_before_a_preference(read):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "response_1": "A", "response_2": "B"}
    assert read({**row, "preference_strength": 3}) == ("paired", ("Q", "A", "B"))


FIRST, SECOND = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: 1+1?\n\nAssistant:"
SHARED = f"{FIRST} Hello.{SECOND}"
TURNS = [{"role": "user", "content": "Hi"}, assistant("Hello."), {"role": "user", "content": "1+1?"}]


class TestDialogue:
    """What both sides say, and what a human says, is never an answer."""

    def test_the_prompt_ends_with_the_last_common_turn(self, read):
        row = {"chosen": f"{SHARED} Two, I think.", "rejected": f"{SHARED} Two, or so."}
        assert read(row) == ("paired", (SHARED, " Two, I think.", " Two, or so."))
        assert read(row, apply_chat_template=True)[1] == (TURNS, "Two, I think.", "Two, or so.")

    def test_a_human_turn_after_the_sides_part_has_no_label(self, read_records, tokenizers):
        row = {"chosen": f"{FIRST} Hello.{SECOND} Two", "rejected": f"{FIRST} Go!"}
        _, (chosen, rejected) = read_records([row])
        assert (chosen.prompt, rejected.prompt, rejected.masked_spans) == (FIRST, FIRST, ())
        assert chosen.masked_spans == ((0, len(" Hello."), len(f" Hello.{SECOND}")),)
        [sample], _ = tokenise([chosen], tokenizers["characters"], max_len=999)
        marked = "".join(map(str, sample.mask))
        assert marked == "1" * len(" Hello.") + "0" * len(SECOND) + "1" * len(" Two" + "E")
        _, (chosen, rejected) = read_records([row], apply_chat_template=True)
        assert (chosen.prompt, chosen.messages) == (TURNS[:1], [*TURNS[1:], assistant("Two")])
        assert rejected.messages == [assistant("Go!")]

    @pytest.mark.parametrize("before", ["", f"{FIRST} Hello."])
    def test_sides_that_part_in_a_human_turn_are_refused(self, read, before):
        texts = [f"{before}\n\nHuman: {number}+1?\n\nAssistant: Two" for number in (1, 2)]
        row = dict(zip(("chosen", "rejected"), texts, strict=True))
        message = "^data.jsonl line 1: 'chosen' and 'rejected' part in a human turn; let them part in the assistant's"
        with pytest.raises(UserError, match=message):
            read(row)
        message = "part in a user turn; let" if before else "'rejected' does not start with the prompt of 'chosen'"
        with pytest.raises(UserError, match=message):
            read(row, apply_chat_template=True)

    @pytest.mark.parametrize("end", ["", " ", f" Two{FIRST}", " Two\n\nHuman: ok"])
    def test_a_side_without_an_answer_is_refused(self, read, end):
        row = {"chosen": f"{SHARED} Two", "rejected": f"{SHARED}{end}"}
        with pytest.raises(UserError, match="line 1: 'rejected' ends where its answer should begin; give it an"):
            read(row)
        with pytest.raises(UserError, match="line 1: 'rejected' ends with a user message"):
            read(row, apply_chat_template=True)

    def test_one_side_may_go_on(self, read_records):
        row = {"chosen": [USER, assistant("2"), USER, assistant("yes")], "rejected": [USER, assistant("2")]}
        _, (chosen, rejected) = read_records([row], apply_chat_template=True)
        assert (chosen.prompt, chosen.messages, rejected.messages) == ([USER], row["chosen"][1:], row["rejected"][1:])

    @pytest.mark.parametrize(
        "prompt",
        [
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
            "<|user|>\nQ\n<|assistant|>\n",
            "<extra_id_1>User\nQ\n<extra_id_1>Assistant\n",
            "[INST] Q [/INST]",
            "### Instruction:\nQ\n\n### Response:\n",
        ],
    )
    def test_text_that_a_template_wrote(self, read_records, prompt):
        row = {"chosen": f"{prompt}It is 2{prompt}Sure", "rejected": f"{prompt}It is 3"}
        _, (chosen, rejected) = read_records([row])
        assert (chosen.prompt, chosen.steps, rejected.steps) == (prompt, [f"It is 2{prompt}Sure"], ["It is 3"])
        assert chosen.masked_spans == ((0, len("It is 2"), len(f"It is 2{prompt}")),)

    def test_an_answer_may_be_a_dialogue_for_its_own_sake(self, read):
        texts = {side: f"Human: Hi\n\nAssistant: {text}" for side, text in (("chosen", "yo"), ("rejected", "hm"))}
        asked = {"role": "user", "content": "Write a dialogue."}
        expected = ([asked], texts["chosen"], texts["rejected"])
        assert read({"prompt": "Write a dialogue.", **texts}, apply_chat_template=True)[1] == expected

    def test_a_prompt_column(self, read):
        row = {"prompt": SHARED, "chosen": f"{SHARED} Two", "rejected": f"{SHARED} Three"}
        assert read(row)[1] == (SHARED, " Two", " Three")
        assert read(row, apply_chat_template=True)[1] == (TURNS, "Two", "Three")
        ranked = {"prompt": SHARED, "answers": [{"answer": text, "rank": rank} for rank, text in enumerate("ab")]}
        assert read(ranked, apply_chat_template=True) == ("ranked", (TURNS, "a", "b"))
        assert read(ranked)[1] == (SHARED, "a", "b")
        row["chosen"] = f" Two{SECOND} Two"
        assert read(row, apply_chat_template=True)[1] == (TURNS, "Two", "Three")


def test_answers_that_all_begin_with_their_prompt(read_records):
    prompt = "How many rolls left the shop?"
    row = {"prompt": prompt, "chosen": f"{prompt} 2", "rejected": f"{prompt} 3"}
    message = (
        "^data.jsonl: all answers begin with the text of their prompt; remove it from them, leave out the prompt's"
    )
    with pytest.raises(UserError, match=message):
        read_records([row, row])
    for rows, flags in (([row, {**row, "rejected": "3"}], {}), ([row], {"format": "paired"})):
        assert [one.steps for one in read_records(rows, **flags)[1][:2]] == [[f"{prompt} 2"], [f"{prompt} 3"]]
    assert read_records([{"prompt": "1+1=", "chosen": "1+1=2", "rejected": "1+1=3"}])[1]


SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "more, prompt",
    [
        ({"system": "S"}, [SYSTEM, USER]),
        ({"system": "S", "prompt": "Q"}, [SYSTEM, USER]),
        ({"system": "S", "prompt": "another text of it"}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"history": [["h", "i"]]}, [{"role": "user", "content": "h"}, assistant("i"), USER]),
        ({"prompt": [USER, assistant("A")]}, [USER]),
    ],
)
def test_what_stands_beside_whole_conversations(read, more, prompt):
    row = {"chosen": [USER, assistant("A")], "rejected": [USER, assistant("B")], **more}
    assert read(row, apply_chat_template=True)[1] == (prompt, "A", "B")


def test_a_prompt_that_has_nothing_to_do_with_the_sides(read):
    row = {"prompt": [{"role": "user", "content": "R"}], "chosen": [USER, assistant("A")]}
    with pytest.raises(UserError, match="line 1: the conversations of 'chosen' and 'rejected' do not go on from the"):
        read({**row, "rejected": [USER, assistant("B")]}, apply_chat_template=True)


@pytest.mark.parametrize("length", range(20))
def test_the_place_where_texts_part_is_exact(read, length):
    shared = f"\n\nHuman: {'x' * length}\n\nAssistant:"
    assert read({"chosen": f"{shared}A and more", "rejected": f"{shared}B"})[1] == (shared, "A and more", "B")


def test_a_system_text_before_a_text_pair(read):
    assert read({"system": "S", "chosen": "It is A", "rejected": "It is B"})[1] == ("S\n\nIt is", " A", " B")


def test_the_worse_answer_beside_messages(read, read_records):
    turns = [USER, assistant("hm"), {"role": "user", "content": "go on"}]
    row = {"messages": [*turns, assistant("A")], "rejected_response": [assistant("B")]}
    assert read(row, apply_chat_template=True)[1] == (turns, "A", "B")
    other = [{"role": "user", "content": "R"}, assistant("B")]
    with pytest.raises(UserError, match="'rejected_messages' does not start with the prompt of 'messages'"):
        read({"messages": [USER, assistant("A")], "rejected_messages": other}, apply_chat_template=True)
    with pytest.raises(UserError, match="'messages' has nothing before its answer; start it with the user's"):
        read({"messages": [assistant("A")], "rejected_response": "B"}, apply_chat_template=True)


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
