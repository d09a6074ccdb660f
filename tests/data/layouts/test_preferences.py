"""Layouts of compared answers: which side is better, where the prompt ends, and what is refused."""

import pytest

from pipa_openrlhf.data.dataset import TIES, load_samples
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
    with pytest.raises(UserError, match="the rows may be paired or compared"):
        read({"prompt": "Q", "response1": "A", "response2": "B", "overall_preference": 2}, **keys)


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
