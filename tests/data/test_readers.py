"""Every format to Records, compared with what the row says by hand."""

import json

import pytest

from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}
USER_B = {"role": "user", "content": "other"}


HUMAN = "\n\nHuman: Hi\n\nAssistant:"


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(read_records):
    def read(row: dict, **flags):
        return read_records([row], **flags)

    return read


def test_unpaired(read):
    name, (record,) = read({"prompt": " Q\n", "completion": " A ", "label": True})
    assert name == "unpaired"
    assert (record.prompt, record.steps, record.step_labels, record.answer_label) == (" Q\n", [" A "], None, 1)
    assert (record.problem_id, record.where, record.pair_id) == (" Q\n", "data.jsonl line 1", None)


@pytest.mark.parametrize(
    "value, label",
    [
        *[(True, 1), (False, 0), (1, 1), (0, 0), (-1, 0), (1.0, 1), (0.0, 0), (-1.0, 0)],
        *[("true", 1), ("False", 0), ("1", 1), ("0", 0), ("+", 1), ("-", 0), (" Yes", 1), ("incorrect", 0)],
    ],
)
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


def test_pair_ids_differ_between_rows(read_records):
    _, records = read_records([{"prompt": "Q", "chosen": "A", "rejected": "B"}] * 2)
    assert [record.pair_id for record in records] == [0, 0, 1, 1]


def test_paired_by_other_columns(read):
    row = {"question": "Q", "prompt": "not this", "better": "A", "worse": "B"}
    name, (chosen, rejected) = read(row, prompt_key="question", chosen_key="better", rejected_key="worse")
    assert (name, chosen.prompt, chosen.steps, rejected.steps) == ("paired", "Q", ["A"], ["B"])


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes, Sir",
            "\n\nHuman: Hi\n\nAssistant: Yes, Madam",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        ("Q: 1+1?\nIt is 2", "Q: 1+1?\nIt is 2 or 3", "Q: 1+1?\nIt is"),
        ("Q 2", "Q 2 ", "Q"),
        ("Q  2", "Q  3", "Q"),
    ],
)
def test_the_prompt_of_text_without_one_is_what_both_begin_with(read, chosen, rejected, prompt):
    _, records = read({"chosen": chosen, "rejected": rejected})
    assert [(one.prompt, *one.steps) for one in records] == [
        (prompt, text.removeprefix(prompt)) for text in (chosen, rejected)
    ]
    assert records[0].problem_id == records[1].problem_id == prompt


def test_texts_with_nothing_in_common_have_an_empty_prompt(read):
    with pytest.raises(UserError, match="2 of 2 answers have an empty prompt.*--data.allow_empty_prompt"):
        read({"chosen": "blue", "rejected": "blurred"})
    _, (chosen, rejected) = read({"chosen": "blue", "rejected": "blurred"}, allow_empty_prompt=True)
    assert (chosen.prompt, rejected.prompt, chosen.steps) == ("", "", ["blue"])
    assert chosen.problem_id == rejected.problem_id == "data.jsonl line 1"


def test_rows_with_an_empty_prompt_are_problems_of_their_own(read):
    _, (record,) = read({"prompt": "", "completion": "blue", "label": 1}, allow_empty_prompt=True)
    assert record.problem_id == "data.jsonl line 1"


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


@pytest.mark.parametrize(
    "values, flags, labels",
    [
        ([0.875, 0.5, 0.125], {}, [1, 1, 0]),
        ([0.875, 0.5, 0.125], {"step_threshold": 0.6}, [1, 0, 0]),
        (["0.875", "+", "-"], {}, [1, 1, 0]),
        ([1, 0, -1], {}, [1, None, 0]),
        ([1, 0, -1], {"neutral_step": "positive"}, [1, 1, 0]),
        ([1, 0, -1], {"neutral_step": "negative"}, [1, 0, 0]),
        ([1, 0, 0], {}, [1, 0, 0]),
    ],
)
def test_ways_to_rate_steps(read, values, flags, labels):
    _, (record,) = read({"prompt": "Q", "completions": ["a", "b", "c"], "labels": values}, **flags)
    assert record.step_labels == labels


def test_an_answer_may_have_a_label_beside_its_steps(read):
    row = {"prompt": "Q", "completions": ["a", "b"], "labels": [1, 0], "answer_label": True, "right": "no"}
    _, (record,) = read(row)
    assert (record.step_labels, record.answer_label) == ([1, 0], 1)
    _, (record,) = read(row, label_key="right")
    assert record.answer_label == 0


class TestPrefixes:
    """Rows that are beginnings of answers, as TRL's conversion of PRM800K has them."""

    ROWS = [
        {"prompt": "Q", "completions": ["a"], "labels": [1]},
        {"prompt": "Q", "completions": ["a", "b"], "labels": [1, 0]},
        {"prompt": "Q", "completions": ["a", "c"], "labels": [1, 1]},
        {"prompt": "Q", "completions": ["a", "c", "So 3.\n\n# Answer\n\n3"], "labels": [0, 1, 1]},
    ]

    def test_they_have_no_end_and_no_label_of_an_answer(self, read_records):
        _, records = read_records(self.ROWS)
        assert [one.complete for one in records] == [False, False, False, True]
        assert [one.answer_label for one in records] == [None, None, None, 1]
        _, records = read_records(self.ROWS, prefixes="false")
        assert [(one.complete, one.answer_label) for one in records] == [(True, 1), (True, 0), (True, 1), (True, 1)]

    def test_one_that_continues_another_among_many_is_chance(self, read_records):
        others = [{"prompt": f"Q{n}", "completions": ["a", "b"], "labels": [1, 1]} for n in range(40)]
        _, records = read_records([*self.ROWS[:2], *others])
        assert all(one.complete for one in records)

    def test_different_answers_are_no_prefixes(self, read_records):
        rows = [{"prompt": "Q", "completions": ["a", text], "labels": [1, 1]} for text in ("b", "c")]
        _, records = read_records([rows[0], {**rows[1], "prompt": "R"}])
        assert [one.complete for one in records] == [True, True]


@pytest.mark.parametrize(
    "completions",
    [["It is 3. The answer is 3", "The answer is 4"], ["Step 1: a\nStep 2: b", "Step 1: c\nStep 2: d"]],
)
def test_a_list_of_whole_answers_is_no_list_of_steps(read, completions):
    row = {"prompt": "Q", "completions": completions, "labels": [1, 0]}
    with pytest.raises(UserError, match="several whole answers.*--data.format best_of_n or --data.format stepwise"):
        read(row)
    assert read(row, format="stepwise")[1][0].steps == completions


@pytest.mark.parametrize("name", ["question", "instruction", "problem", "query", "input"])
def test_the_prompt_by_its_other_names(read, name):
    _, (record,) = read({name: "Q", "completion": "A", "label": 1})
    assert record.prompt == "Q"


def test_what_stands_beside_the_prompt_belongs_to_it(read):
    row = {"system": "S", "history": [["q", "a"]], "instruction": "Q", "input": "x", "completion": "A", "label": 1}
    _, (record,) = read(row)
    assert record.prompt == "S\n\nq\n\na\n\nQ\nx"
    _, (record,) = read(row, apply_chat_template=True)
    before = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, assistant("a")]
    assert record.prompt == [*before, {"role": "user", "content": "Q\nx"}]


def test_unread_columns_are_named(read, caplog):
    with caplog.at_level("INFO"):
        read({"prompt": "Q", "completion": "A", "label": 1, "mood": 3, "source": "x"})
    assert "data.jsonl: not read: mood, source" in caplog.text
    assert "format unpaired (by its columns: prompt, completion, label)" in caplog.text


@pytest.mark.parametrize("weight, expected", [(2, 2.0), (0.5, 0.5), (None, 1.0), ("3", 3.0)])
def test_weight(read, weight, expected):
    _, (record,) = read({"prompt": "Q", "completion": "A", "label": 1, "weight": weight})
    assert record.weight == expected


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), "many", True])
def test_bad_weights(read_records, weight):
    with pytest.raises(UserError, match="line 1: 'weight' is .*; give a number from 0 on"):
        read_records([{"prompt": "Q", "completion": "A", "label": 1, "weight": weight}])


def test_sharegpt_messages_and_text_parts(read):
    row = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"role": "assistant", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
    }
    _, (chosen, rejected) = read(row, apply_chat_template=True)
    assert (chosen.prompt, chosen.messages, rejected.messages) == ([USER], [assistant("A")], [assistant("BC")])


OWN_LAYOUT = """
from pipa_openrlhf.data.layouts.conversation import join, make_record, to_answer


def fits(row, flags):
    return "mine" in row


def read(row, where, index, flags):
    answer = to_answer(row["mine"], "mine", where)
    return [make_record(row, where, join("Q", answer, flags, where), step_labels=None, answer_label=1)]
"""


def test_a_layout_of_ones_own(read, tmp_path):
    path = tmp_path / "my_layout.py"
    path.write_text(OWN_LAYOUT)
    name, (record,) = read({"mine": "A", "prompt": "P", "completion": "x", "label": 0}, layout_module=str(path))
    assert (name, record.prompt, record.steps, record.answer_label) == ("my_layout", "Q", ["A"], 1)
    path.with_name("other.py").write_text("fits = None")
    with pytest.raises(UserError, match="other.py: it has no fits and no read"):
        read({"mine": "A"}, layout_module=str(path.with_name("other.py")))
    with pytest.raises(UserError, match="no such Python file"):
        read({"mine": "A"}, layout_module=str(tmp_path / "none.py"))


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

    def test_without_a_prompt_the_common_messages_are_it(self, read):
        row = {
            "chosen": [USER, assistant("A"), USER_B, assistant("C")],
            "rejected": [USER, assistant("B"), USER_B, assistant("C")],
        }
        _, (chosen, rejected) = read(row, apply_chat_template=True)
        assert chosen.prompt == rejected.prompt == [USER]
        assert chosen.messages == [assistant("A"), USER_B, assistant("C")]

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

    def test_input_template_is_for_text(self, read):
        row = {"prompt": "Q", "completion": "A", "label": 1}
        _, (record,) = read(row, input_template="U: {}\nA:")
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
