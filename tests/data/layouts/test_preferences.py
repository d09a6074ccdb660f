"""Layouts of preference pairs, compared with what the rows say by hand and with samples of public files."""

import copy
import importlib

import pytest

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts import LAYOUTS
from pipa_openrlhf.errors import UserError

Q = "What is 1+1?"
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": Q}
AGAIN = {"role": "user", "content": "Sure?"}
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 1+1?\n\nAssistant:"
HUMAN_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1+1?"},
]


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(read_records):
    """Layout, and of each record its side, its prompt and its answer."""

    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        assert [one.side for one in records] == [one.answer_label for one in records]
        assert len({one.pair_id for one in records}) <= 1
        assert len({one.problem_id for one in records}) <= 1
        return name, [(one.side, one.prompt, _answer(one)) for one in records]

    return read


def _answer(record):
    return record.messages or record.steps


def pair(prompt, better, worse) -> list:
    return [(1, prompt, better), (0, prompt, worse)]


class TestNamesOfTheSides:
    @pytest.mark.parametrize(
        "better, worse",
        [
            ("chosen", "rejected"),
            ("chosen_response", "rejected_response"),
            ("preferred_output", "non_preferred_output"),
            ("response", "rejected_response"),
            ("response_j", "response_k"),
        ],
    )
    def test_whatever_the_order_and_the_scores(self, read, better, worse):
        row = {worse: "3", "score_chosen": 1.0, "score_rejected": 5.0, better: "2", "question": Q}
        assert read(row) == ("paired", pair(Q, ["2"], ["3"]))

    def test_columns_that_are_null_give_way(self, read):
        row = {"prompt": Q, "chosen": None, "rejected": None, "chosen_response": "2", "rejected_response": "3"}
        assert read(row)[1] == pair(Q, ["2"], ["3"])

    def test_nemo_aligner_is_text_as_it_is(self, read):
        prompt = "<extra_id_0>System\n\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\n"
        row = {"prompt": prompt, "chosen_response": "A\n<extra_id_1>", "rejected_response": "B\n<extra_id_1>"}
        assert read(row)[1] == pair(prompt, ["A\n<extra_id_1>"], ["B\n<extra_id_1>"])

    def test_openai(self, read):
        row = {
            "input": {"messages": [SYSTEM, USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("2")],
            "non_preferred_output": [assistant("3")],
        }
        expected = pair([SYSTEM, USER], [assistant("2")], [assistant("3")])
        assert read(row, apply_chat_template=True) == ("paired", expected)
        row["input"]["tools"] = [{"type": "function"}]
        with pytest.raises(UserError, match="^data.jsonl line 1: 'input.tools' is .*; tools are not shown"):
            read(row, apply_chat_template=True)

    def test_ultrainteract_has_the_assistants_turns_in_the_prompt(self, read):
        turns = [("user", "Q"), ("assistant", "a"), ("user", "no")]
        row = {"trajectory": [{"from": role, "value": text} for role, text in turns], "chosen": "2", "rejected": "3"}
        prompt = [{"role": role, "content": text} for role, text in turns]
        assert read({**row, "id": "b", "parent_id": "a"}, apply_chat_template=True)[1] == pair(prompt, ["2"], ["3"])


class TestSwift:
    ROW = {"messages": [SYSTEM, USER, assistant("2")], "rejected_response": "3"}

    def test_text_takes_the_place_of_the_last_message(self, read):
        expected = pair([SYSTEM, USER], [assistant("2")], ["3"])
        assert read(self.ROW, apply_chat_template=True) == ("swift_pair", expected)

    def test_messages_follow_the_users_last(self, read):
        row = {"messages": [USER, assistant("hm"), AGAIN, assistant("2")], "rejected_response": [assistant("3")]}
        expected = pair([USER, assistant("hm"), AGAIN], [assistant("2")], [assistant("3")])
        assert read(row, apply_chat_template=True)[1] == expected

    def test_a_whole_worse_conversation(self, read):
        row = {**self.ROW, "rejected_response": None, "rejected_messages": [SYSTEM, USER, assistant("3")]}
        expected = pair([SYSTEM, USER], [assistant("2")], [assistant("3")])
        assert read(row, apply_chat_template=True)[1] == expected

    @pytest.mark.parametrize(
        "changes, flags, problem",
        [
            ({}, {"apply_chat_template": False}, "'messages' holds messages; add --data.apply_chat_template"),
            ({"rejected_response": None}, {}, "'rejected_response' is null"),
            ({"messages": [assistant("2")]}, {}, "'messages' has nothing before its answer; start it with the user's"),
        ],
    )
    def test_bad_rows(self, read, changes, flags, problem):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {problem}"):
            read({**self.ROW, **changes}, **{"apply_chat_template": True, **flags})


class TestCompared:
    @pytest.mark.parametrize("value, better", [(-3, 0), (-1, 0), (1, 1), (3, 1), ("-2", 0), (2.0, 1), (0, None)])
    @pytest.mark.parametrize(
        "first, second, name",
        [
            ("response_1", "response_2", "preference_strength"),
            ("response1", "response2", "overall_preference"),
        ],
    )
    def test_helpsteer_says_by_the_sign(self, read, first, second, name, value, better):
        name, found = read({name: value, "prompt": Q, second: "second", first: "first"})
        assert name == "compared"
        assert found == expected(better, "first", "second")

    @pytest.mark.parametrize("value", [0, 1])
    def test_pku_gives_the_index(self, read, value):
        row = {"prompt": Q, "response_0": "a", "response_1": "b", "better_response_id": value}
        found = read({**row, "safer_response_id": 1 - value})
        assert found == ("compared", expected(value, "a", "b"))

    @pytest.mark.parametrize("value, better", [(1, 0), (0, 1)])
    def test_shp_and_halos_say_whether_a_is_better(self, read, value, better):
        row = {"history": Q, "human_ref_A": "a", "human_ref_B": "b", "labels": value, "score_A": 1, "score_B": 9}
        assert read(row) == ("compared", expected(better, "a", "b"))
        assert read(row, prompt_key="history")[1] == expected(better, "a", "b")
        row = {"prompt": Q, "output_A": "a", "output_B": "b", "label": value}
        assert read(row) == ("compared", expected(better, "a", "b"))

    def test_halos_label_follows_from_the_rewards(self, read):
        row = {"prompt": Q, "output_A": "a", "output_B": "b", "label": 0, "reward_A": 0.1, "reward_B": 0.9}
        assert read(row)[1] == expected(1, "a", "b")
        assert read({**row, "reward_A": 0.9})[1] == []
        with pytest.raises(UserError, match="line 1: 'label' is 1 beside 'reward_A' 0.1 and 'reward_B' 0.9; correct"):
            read({**row, "label": 1})

    @pytest.mark.parametrize(
        "winner, better", [("model_a", 0), ("model_b", 1), ("tie", None), ("tie (bothbad)", None)]
    )
    def test_arena(self, read, winner, better):
        conversations = [[USER, assistant(text), AGAIN, assistant("yes")] for text in "23"]
        row = {"conversation_a": conversations[0], "conversation_b": conversations[1], "winner": winner}
        name, found = read(row, apply_chat_template=True)
        sides = [one[1:] for one in conversations]
        assert name == "compared"
        assert found == ([] if better is None else pair([USER], sides[better], sides[1 - better]))

    def test_messages_before(self, read):
        row = {"context": [USER, assistant("hm"), AGAIN], "response1": "2", "response2": "3", "overall_preference": -1}
        assert read(row, apply_chat_template=True)[1] == pair(row["context"], ["2"], ["3"])

    @pytest.mark.parametrize(
        "changes, problem",
        [
            ({"preference_strength": 4}, "'preference_strength' is 4; a preference is from -3"),
            ({"preference_strength": -100}, "'preference_strength' is -100; a preference is from -3"),
            ({"preference_strength": None}, "'preference_strength' is null; give it a value"),
            ({"preference_strength": "much"}, "'preference_strength' is 'much'; give the number"),
            ({"preference_strength": True}, "'preference_strength' is True; give the number"),
            ({"preference_strength": float("nan")}, "'preference_strength' is nan; give the number"),
            ({"response_1": ""}, "'response_1' is empty"),
            ({"response_2": None}, "'response_2' is null"),
        ],
    )
    def test_bad_rows(self, read, changes, problem):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {problem}"):
            read({"prompt": Q, "response_1": "2", "response_2": "3", "preference_strength": 1, **changes})

    @pytest.mark.parametrize(
        "row, problem",
        [
            ({"response_0": "a", "response_1": "b", "better_response_id": 2}, "'better_response_id' is 2; give 0"),
            ({"output_A": "a", "output_B": "b", "label": -1}, "'label' is -1; give 1 where A is better"),
            ({"response_a": "a", "response_b": "b", "winner": "c"}, "'winner' is 'c'; give \"model_a\""),
        ],
    )
    def test_bad_preferences(self, read, row, problem):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {problem}"):
            read({"prompt": Q, **row})

    def test_ties_are_no_pair_among_others(self, read_records):
        row = {"prompt": Q, "response1": "2", "response2": "3"}
        _, records = read_records([{**row, "overall_preference": value} for value in (0, -1, 0)])
        assert [(one.side, one.pair_id) for one in records] == [(1, 1), (0, 1)]


def expected(better: int | None, first: str, second: str) -> list:
    if better is None:
        return []
    return pair(Q, *([first], [second])[:: 1 if better == 0 else -1])


class TestKeyFlags:
    """They must not overrule a column that says row by row which side is better."""

    @pytest.mark.parametrize(
        "row",
        [
            {"response_0": "a", "response_1": "b", "better_response_id": 1},
            {"response_0": "a", "response_1": "b", "overall_preference": -1},
            {"response_0": "a", "response_1": "b", "Winner": "x"},
            {"response_0": "a", "response_1": "b", "choice": 1},
            {"response_0": "a", "response_1": "b", "label": 1},
            {"response_0": "a", "response_1": "b", "labels": 0},
        ],
    )
    def test_they_are_refused(self, read, row):
        flags = {"chosen_key": "response_0", "rejected_key": "response_1"}
        with pytest.raises(UserError, match="^data.jsonl line 1: --data.chosen_key response_0 .* may say which is be"):
            read({"prompt": Q, **row}, **flags)
        assert read({"prompt": Q, **row}, **flags, format="paired")[1] == pair(Q, ["a"], ["b"])

    def test_columns_that_were_named_or_are_null_do_not_count(self, read):
        row = {"better_question": Q, "preferred": "a", "better": None, "worse": "b"}
        flags = {"chosen_key": "preferred", "rejected_key": "worse", "prompt_key": "better_question"}
        assert read(row, **flags) == ("paired", pair(Q, ["a"], ["b"]))

    def test_names_of_the_sides_win_over_a_preference(self, read):
        row = {"prompt": Q, "chosen": "c", "rejected": "r", "response_1": "c", "response_2": "r"}
        assert read({**row, "preference_strength": 3}) == ("paired", pair(Q, ["c"], ["r"]))


class TestRanked:
    def test_nectar_is_best_against_worst(self, read):
        answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in (("b", 2.0), ("a", 1.0), ("c", 3.0))]
        prompt = "\n\nHuman: 1+1?\n\nAssistant: "
        assert read({"prompt": prompt, "answers": answers}) == ("ranked", pair(prompt, ["a"], ["c"]))
        (chosen, _) = read({"prompt": HUMAN + " ", "answers": answers}, apply_chat_template=True)[1]
        assert chosen == (1, HUMAN_TURNS, ["a"])

    def test_nemo_rl(self, read):
        completions = [{"rank": rank, "completion": [assistant(str(rank))]} for rank in (1, 0)]
        found = read({"context": [USER], "completions": completions, "task_name": "x"}, apply_chat_template=True)
        assert found == ("ranked", pair([USER], [assistant("0")], [assistant("1")]))

    def test_an_object_of_lists(self, read):
        assert read({"prompt": Q, "answers": {"answer": ["b", "a"], "rank": [2, 1]}})[1] == pair(Q, ["a"], ["b"])

    def test_ties(self, read):
        answers = [{"answer": text, "rank": rank} for text, rank in (("a", 1), ("b", 1), ("c", 2))]
        assert read({"prompt": Q, "answers": answers})[1] == pair(Q, ["a"], ["c"])
        assert read({"prompt": Q, "answers": answers[:2]})[1] == []

    @pytest.mark.parametrize("rank", [None, "1", True, float("nan")])
    def test_bad_ranks(self, read, rank):
        with pytest.raises(UserError, match="^data.jsonl line 1: 'answers\\[1\\].rank' is .*; a rank is a number"):
            read({"prompt": Q, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": rank}]})


class TestSharedDialogue:
    """What both sides say is never an answer."""

    def test_text(self, read):
        row = {"chosen": HUMAN + " Two, I think.", "rejected": HUMAN + " Two, or so."}
        assert read(row) == ("paired", pair(HUMAN, [" Two, I think."], [" Two, or so."]))

    def test_text_as_messages(self, read):
        row = {"chosen": HUMAN + " Two, I think.", "rejected": HUMAN + " Two, or so."}
        expected = pair(HUMAN_TURNS, [assistant("Two, I think.")], [assistant("Two, or so.")])
        assert read(row, apply_chat_template=True)[1] == expected

    @pytest.mark.parametrize("end", ["", " "])
    def test_an_empty_answer_is_refused(self, read, end):
        row = {"chosen": HUMAN + " Two", "rejected": HUMAN + end}
        with pytest.raises(UserError, match="^data.jsonl line 1: 'rejected' is empty after the prompt"):
            read(row)
        with pytest.raises(UserError, match="^data.jsonl line 1: 'rejected' ends with a user message"):
            read(row, apply_chat_template=True)

    def test_sides_that_part_in_a_human_turn_are_refused(self, read):
        text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {}+1?\n\nAssistant: Two"
        row = {"chosen": text.format(1), "rejected": text.format(2)}
        with pytest.raises(UserError, match="^data.jsonl line 1: 'chosen' and 'rejected' part in a human message"):
            read(row)
        with pytest.raises(UserError, match="^data.jsonl line 1: 'chosen' and 'rejected' part in a user message"):
            read(row, apply_chat_template=True)

    def test_one_side_may_go_on(self, read):
        row = {"chosen": [USER, assistant("2"), AGAIN, assistant("yes")], "rejected": [USER, assistant("2")]}
        assert read(row, apply_chat_template=True)[1] == pair([USER], row["chosen"][1:], row["rejected"][1:])

    def test_sides_that_part_early_have_the_humans_words_masked(self, read_records):
        head, turn = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: 1+1?\n\nAssistant:"
        row = {"chosen": f"{head} Hello.{turn} Two", "rejected": f"{head} Go!"}
        _, (chosen, rejected) = read_records([row])
        assert (chosen.prompt, rejected.prompt, rejected.masked_spans) == (head, head, ())
        ((_, start, end),) = chosen.masked_spans
        assert chosen.steps[0][start:end] == turn

    @pytest.mark.parametrize(
        "prompt",
        [
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "[INST] Q [/INST]",
            "### Instruction:\nQ\n\n### Response:\n",
        ],
    )
    def test_text_that_a_template_wrote(self, read, prompt):
        row = {"chosen": f"{prompt}It is 2", "rejected": f"{prompt}It is 3"}
        assert read(row)[1] == pair(prompt, ["It is 2"], ["It is 3"])

    def test_a_prompt_column_that_the_sides_repeat(self, read):
        row = {"prompt": HUMAN, "chosen": HUMAN + " Two", "rejected": HUMAN + " Three"}
        assert read(row)[1] == pair(HUMAN, [" Two"], [" Three"])
        prompt = "How many rolls left the shop?"
        row = {"prompt": prompt, "chosen": f"{prompt} 2", "rejected": f"{prompt} 3"}
        with pytest.raises(UserError, match="^data.jsonl: all answers begin with the text of their prompt; remove"):
            read(row)
        assert read(row, format="paired")[1] == pair(prompt, [f"{prompt} 2"], [f"{prompt} 3"])

    @pytest.mark.parametrize(
        "more, prompt",
        [
            ({"prompt": Q}, [USER]),
            ({"prompt": [USER]}, [USER]),
            ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
            ({"prompt": [SYSTEM]}, [SYSTEM, USER]),
            ({"messages": [USER, assistant("2")]}, [USER]),
            ({"system": "S"}, [SYSTEM, USER]),
            ({"system": "S", "prompt": Q}, [SYSTEM, USER]),
        ],
    )
    def test_whole_conversations_beside_a_prompt(self, read, more, prompt):
        row = {"chosen": [USER, assistant("2")], "rejected": [USER, assistant("3")], **more}
        assert read(row, apply_chat_template=True)[1] == pair(prompt, [assistant("2")], [assistant("3")])

    def test_a_prompt_that_has_nothing_to_do_with_the_sides(self, read):
        row = {"prompt": [AGAIN], "chosen": [USER, assistant("2")], "rejected": [USER, assistant("3")]}
        with pytest.raises(UserError, match="line 1: the conversations of 'chosen' and 'rejected' do not go on from"):
            read(row, apply_chat_template=True)


class TestUncompared:
    def test_scores_of_single_answers(self, read):
        row = {"prompt": Q, "response": "2", "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1}
        with pytest.raises(
            UserError, match="^data.jsonl: helpfulness, .* score single answers .*; take the data set's"
        ):
            read(row)

    def test_prompts_only(self, read):
        with pytest.raises(UserError, match="^data.jsonl: it holds prompts only, without answers or labels; take"):
            read({"dataset": "x", "context": Q, "context_messages": [USER], "id": "0"})


@pytest.mark.parametrize("name", ["paired", "compared", "ranked", "swift_pair", "uncompared"])
def test_no_example_fits_another_layout(name):
    row = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").EXAMPLE
    flags = DataConfig()
    assert [
        other for other in LAYOUTS if importlib.import_module(f"pipa_openrlhf.data.layouts.{other}").fits(row, flags)
    ] == [name]


def test_reading_leaves_the_row_as_it_was(read):
    row = {"prompt": Q, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}
    before = copy.deepcopy(row)
    read(row)
    assert row == before


RIGHT = ("40", "25", "10")
WRONG = ("32", "24", "25")


@pytest.mark.parametrize(
    "file, layout",
    [
        *[
            (f"ultrafeedback_{name}", "paired")
            for name in ("argilla", "binarized_h4", "llamafactory_alpaca", "trl_lib")
        ],
        *[(f"axolotl_{name}", "paired") for name in ("argilla_chat", "chat_template_default", "chatml_icr")],
        *[(name, "paired") for name in ("axolotl_prompt_pairs", "orca_dpo_pairs", "openrlhf_preference_mixture2")],
        *[(name, "paired") for name in ("skywork_reward_preference", "tulu3_pref_mix", "openai_preference")],
        *[(name, "paired") for name in ("ultrainteract_pair", "llamafactory_alpaca_pref_with_input")],
        *[(f"helpsteer{name}_preference", "compared") for name in "23"],
        *[(name, "compared") for name in ("halos_pairwise_feedback", "pku_safe_rlhf")],
        *[(name, "ranked") for name in ("axolotl_nectar", "nemo_rl_preference")],
        ("ms_swift_dpo", "swift_pair"),
    ],
)
def test_the_right_answer_of_a_sample_is_chosen(read_records, sample_rows, file, layout):
    """The samples have a right and a wrong answer to the same three problems."""
    rows = sample_rows(f"{file}.json" if file.startswith("halos") else f"{file}.jsonl")
    name, records = read_records(rows, apply_chat_template=True)
    assert name == layout
    assert len(records) == 2 * len(rows)
    for number, (chosen, rejected) in enumerate(zip(records[::2], records[1::2], strict=True)):
        for one, results in ((chosen, RIGHT), (rejected, WRONG)):
            assert one.steps[-1].endswith(f"The answer is: {results[number]}")
            assert one.prompt[-1]["role"] == "user"
            assert "The answer is" not in str(one.prompt)
            assert one.messages is None or [message["role"] for message in one.messages] == ["assistant"]


def test_llamafactorys_demo(read_records, sample_rows):
    name, records = read_records(sample_rows("llamafactory_dpo_en_demo.json"), apply_chat_template=True)
    assert name == "paired"
    keys = ("prompt", "steps", "step_labels", "answer_label", "complete")
    expected = [{key: row[key] for key in keys} for row in sample_rows("right_reading/llamafactory_dpo_en_demo.jsonl")]
    assert [{key: getattr(one, key) for key in keys} for one in records] == expected
