"""Every format to Records, compared with what the row says by hand."""

import json

import pytest

from pipa_openrlhf.data.layouts import read_records

USER = {"role": "user", "content": "Q"}
USER_B = {"role": "user", "content": "other"}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(make_args):
    def read(row: dict, **flags):
        name, records = read_records([("data.jsonl line 1", row)], make_args(**flags).data)
        return name, records

    return read


def test_unpaired(read):
    name, (record,) = read({"prompt": " Q\n", "completion": " A ", "label": True})
    assert name == "unpaired"
    assert (record.prompt, record.steps, record.step_labels, record.answer_label) == (" Q\n", [" A "], None, 1)
    assert (record.problem_id, record.where, record.pair_id) == (" Q\n", "data.jsonl line 1", None)


@pytest.mark.parametrize("value, label", [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), (0.0, 0)])
def test_ways_to_write_a_label(read, value, label):
    _, (record,) = read({"prompt": "Q", "completion": "A", "label": value})
    assert record.answer_label == label


def test_unpaired_in_steps_has_no_step_labels(read):
    _, (record,) = read({"prompt": "Q", "completion": ["a", "b"], "label": 0})
    assert (record.steps, record.step_labels) == (["a", "b"], None)


@pytest.mark.parametrize("problem_id, expected", [("p7", "p7"), (7, "7"), (None, "Q")])
def test_problem_id(read, problem_id, expected):
    _, (record,) = read({"prompt": "Q", "completion": "A", "label": 1, "problem_id": problem_id})
    assert record.problem_id == expected


def test_paired(read):
    name, (chosen, rejected) = read({"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert name == "paired"
    assert (chosen.steps, chosen.answer_label, chosen.step_labels) == (["A"], 1, None)
    assert (rejected.steps, rejected.answer_label, rejected.step_labels) == (["B"], 0, None)
    assert chosen.pair_id == rejected.pair_id == 0
    assert chosen.prompt == rejected.prompt == "Q"


def test_pair_ids_differ_between_rows(make_args):
    rows = [(f"line {index}", {"prompt": "Q", "chosen": "A", "rejected": "B"}) for index in range(2)]
    _, records = read_records(rows, make_args().data)
    assert [record.pair_id for record in records] == [0, 0, 1, 1]


def test_paired_by_other_columns(read):
    row = {"question": "Q", "prompt": "not this", "better": "A", "worse": "B"}
    name, (chosen, rejected) = read(row, prompt_key="question", chosen_key="better", rejected_key="worse")
    assert (name, chosen.prompt, chosen.steps, rejected.steps) == ("paired", "Q", ["A"], ["B"])


def test_paired_text_without_a_prompt(read):
    _, (chosen, rejected) = read({"chosen": "Human: Q A", "rejected": "Human: Q B"}, input_template="User: {}")
    assert (chosen.prompt, rejected.prompt, chosen.steps) == ("", "", ["Human: Q A"])
    assert chosen.problem_id == rejected.problem_id == "data.jsonl line 1"


def test_paired_in_steps(read):
    row = {"prompt": "Q", "chosen": ["a", "b"], "rejected": ["a", "c", "d"], "rejected_labels": [1, 0, 1]}
    _, (chosen, rejected) = read(row)
    assert (chosen.step_labels, rejected.step_labels) == ([1, 1], [1, 0, 1])
    assert (chosen.answer_label, rejected.answer_label) == (1, 0)  # by column, whatever the last step says
    _, (chosen, _) = read({**row, "chosen_labels": [0, 1]})
    assert chosen.step_labels == [0, 1]
    _, (chosen, rejected) = read({key: value for key, value in row.items() if key != "rejected_labels"})
    assert (chosen.step_labels, rejected.step_labels) == (None, None)


def test_stepwise_takes_the_last_label_for_the_answer(read):
    name, (record,) = read({"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]})
    assert name == "stepwise"
    assert (record.steps, record.step_labels, record.answer_label) == (["a", "b"], [1, 0], 0)
    _, (record,) = read({"prompt": "Q", "completions": ["a", "b"], "labels": [False, True]})
    assert (record.step_labels, record.answer_label) == ([0, 1], 1)


@pytest.mark.parametrize("completions", [[assistant("a"), assistant("b")], [[assistant("a")], [assistant("b")]]])
def test_stepwise_messages(read, completions):
    row = {"prompt": [USER], "completions": completions, "labels": [1, 0]}
    _, (record,) = read(row, apply_chat_template=True)
    assert (record.prompt, record.steps, record.messages) == ([USER], ["a", "b"], None)
    assert record.problem_id == '[{"content":"Q","role":"user"}]'


class TestChat:
    def test_text_becomes_messages(self, read):
        _, (record,) = read({"prompt": "Q", "completion": "A", "label": 1}, apply_chat_template=True)
        assert (record.prompt, record.steps, record.messages, record.problem_id) == ([USER], ["A"], None, "Q")

    def test_a_prompt_of_messages_goes_before_the_completion(self, read):
        row = {"prompt": [USER], "completion": [assistant("A")], "label": 1}
        _, (record,) = read(row, apply_chat_template=True)
        assert (record.prompt, record.messages, record.steps) == ([USER], [assistant("A")], ["A"])

    def test_a_prompt_that_the_completion_repeats_is_used_once(self, read):
        row = {"prompt": [USER], "chosen": [USER, assistant("A")], "rejected": [USER, assistant("B")]}
        _, (chosen, rejected) = read(row, apply_chat_template=True)
        assert (chosen.prompt, chosen.messages) == ([USER], [assistant("A")])
        assert (rejected.prompt, rejected.messages) == ([USER], [assistant("B")])

    def test_without_a_prompt_it_is_all_but_the_last_message(self, read):
        head = [USER, assistant("hm"), USER_B]
        row = {"chosen": [*head, assistant("A")], "rejected": [*head, assistant("B")]}
        _, (chosen, rejected) = read(row, apply_chat_template=True)
        assert (chosen.prompt, chosen.messages) == (head, [assistant("A")])
        assert (rejected.prompt, rejected.messages) == (head, [assistant("B")])
        assert chosen.problem_id == rejected.problem_id

    def test_the_rejected_side_may_be_longer(self, read):
        row = {"chosen": [USER, assistant("A")], "rejected": [USER, assistant("B"), USER_B, assistant("C")]}
        _, (_, rejected) = read(row, apply_chat_template=True)
        assert rejected.messages == [assistant("B"), USER_B, assistant("C")]

    def test_a_text_prompt_beside_whole_conversations_is_not_repeated(self, read):
        row = {"prompt": "Q", "chosen": [USER, assistant("A")], "rejected": [USER, assistant("B")]}
        _, (chosen, rejected) = read(row, apply_chat_template=True)
        assert (chosen.prompt, chosen.messages) == ([USER], [assistant("A")])
        assert (rejected.prompt, rejected.messages) == ([USER], [assistant("B")])

    def test_a_text_prompt_before_assistant_messages_is_the_users(self, read):
        row = {"prompt": "Q", "chosen": [assistant("A")], "rejected": [assistant("B")]}
        _, (chosen, rejected) = read(row, apply_chat_template=True)
        assert (chosen.prompt, chosen.messages, rejected.messages) == ([USER], [assistant("A")], [assistant("B")])

    def test_null_keys_that_parquet_adds_are_left_out(self, read):
        row = {"prompt": [{**USER, "name": None}], "completion": "A", "label": 1}
        _, (record,) = read(row, apply_chat_template=True)
        assert record.prompt == [USER]

    def test_input_template_is_for_text(self, make_args):
        row = {"prompt": "Q", "completion": "A", "label": 1}
        _, (record,) = read_records([("x", row)], make_args(input_template="U: {}\nA:").data)
        assert (record.prompt, record.problem_id) == ("U: Q\nA:", "Q")


def alphamath_row(q_values, **more) -> dict:
    steps = [{"step": f"<step>{index}</step>", "P": 0.5, "Q": q} for index, q in enumerate(q_values)]
    return {"instruction": "<question> 1+2? </question>", "output": json.dumps(steps), **more}


class TestAlphaMath:
    def test_a_wrong_answer_is_labelled_by_the_threshold(self, read):
        name, (record,) = read(alphamath_row([0.9, 0.5, 0.49, -0.3, -1]))
        assert name == "alphamath"
        assert (record.step_labels, record.answer_label) == ([1, 1, 0, 0, 0], 0)
        _, (record,) = read(alphamath_row([0.9, 0.5, 0.49, -0.3, -1]), step_threshold=-0.3)
        assert record.step_labels == [1, 1, 1, 1, 0]

    def test_all_steps_of_a_right_answer_are_right(self, read):
        _, (record,) = read(alphamath_row([-0.9, 0.1, 1]))
        assert (record.step_labels, record.answer_label) == ([1, 1, 1], 1)

    def test_prompt_and_problem(self, read):
        _, (tagged,) = read(alphamath_row([1]))
        _, (bare,) = read({**alphamath_row([1]), "instruction": "1+2?"})
        assert tagged.prompt == bare.prompt == "<question> 1+2? </question>\n"
        assert tagged.problem_id == bare.problem_id == "1+2?"
        assert tagged.steps == ["<step>0</step>"]

    def test_input_follows_on_its_own_line(self, read):
        _, (tagged,) = read(alphamath_row([1], input="x = 2"))
        _, (bare,) = read({**alphamath_row([1], input="x = 2"), "instruction": "1+2?"})
        assert tagged.prompt == "<question> 1+2? </question>\nx = 2\n"
        assert bare.prompt == "<question> 1+2?\nx = 2 </question>\n"
        _, (empty,) = read(alphamath_row([1], input=""))
        assert empty.prompt == "<question> 1+2? </question>\n"

    def test_interpreter_output_is_masked_with_its_tags(self, read):
        step = "a<output>\n3\n</output>b<output>4</output>"
        row = {"instruction": "Q", "output": [{"step": "x", "Q": 0.1}, {"step": step, "Q": 1}], "depth": 3}
        _, (record,) = read(row)
        assert [step[start:end] for _, start, end in record.masked_spans] == [
            "<output>\n3\n</output>",
            "<output>4</output>",
        ]
        assert {index for index, _, _ in record.masked_spans} == {1}
        _, (record,) = read(row, mask_tool_output=False)
        assert record.masked_spans == ()
