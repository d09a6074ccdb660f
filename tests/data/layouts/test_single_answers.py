"""Layouts of single labelled answers and of lists of them, and rows without labels."""

import json

import pytest

from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}


@pytest.fixture
def read(read_records):
    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        return name, [(one.prompt, one.steps, one.answer_label) for one in records]

    return read


@pytest.mark.parametrize("answer", ["completion", "response", "output", "answer", "solution", "generation"])
@pytest.mark.parametrize("label", ["label", "is_correct", "correct", "score", "reward", "acc"])
@pytest.mark.parametrize("value", [True, 0, 1.0, "true"])
def test_names_of_answers_and_labels(read, answer, label, value):
    expected = ("unpaired", [("Q", ["A"], int(value not in (0,)))])
    assert read({"instruction": "Q", answer: "A", label: value, "source": "x"}) == expected


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_whole_conversation(read, name):
    row = {name: [USER, A], "label": "chosen"}
    assert read(row, apply_chat_template=True) == ("unpaired", [([USER], ["A"], 1)])
    sharegpt = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    row = {name: sharegpt, "label": "undesirable"}
    assert read(row, apply_chat_template=True) == ("unpaired", [([USER], ["A"], 0)])
    with pytest.raises(UserError, match="'messages.* holds messages; add --data.apply_chat_template"):
        read({"messages": [USER, A], "label": 1})


def test_a_score_that_is_no_label_is_not_taken_for_one(read):
    with pytest.raises(UserError, match="no column says whether 'response' is right"):
        read({"prompt": "Q", "response": "A", "score": 3.7})


def test_answers_with_a_list_of_labels(read):
    row = {"prompt": "Q", "answers": ["a", "b"], "labels": [1, 0]}
    assert read(row) == ("best_of_n", [("Q", ["a"], 1), ("Q", ["b"], 0)])
    row = {"prompt": "Q", "completions": ["The answer is 1", "The answer is 2"], "labels": [True, False]}
    assert [label for _, _, label in read(row, format="best_of_n")[1]] == [1, 0]
    with pytest.raises(UserError, match="1 'labels' for 2 answers"):
        read({"prompt": "Q", "answers": ["a", "b"], "labels": [1]})


def test_answers_that_are_objects(read):
    row = {"problem": "Q", "responses": [{"text": "a", "is_correct": True}, {"text": "b", "is_correct": "no"}]}
    assert read(row) == ("solutions", [("Q", ["a"], 1), ("Q", ["b"], 0)])
    row = {
        "question": "Q",
        "small": {"solution": "a\n\nb", "is_correct": 0},
        "large": {"solution": "c", "is_correct": 1},
    }
    assert read(row) == ("solutions", [("Q", ["a\n", "b"], 0), ("Q", ["c"], 1)])
    with pytest.raises(UserError, match="'small.is_correct' is 'perhaps'"):
        read({"question": "Q", "small": {"solution": "a", "is_correct": "perhaps"}})


@pytest.mark.parametrize(
    "row, remedy",
    [
        ({"question": "Q", "answer": "A"}, "reference solutions.*pipa_openrlhf.cli.sample"),
        ({"problem": "Q", "solution": "S", "answer": "A"}, "reference solutions.*pipa_openrlhf.cli.sample"),
        ({"instruction": "Q", "input": "", "output": "A"}, "no column says whether 'output' is right: add \"label\""),
        ({"messages": [USER, A]}, "no column says whether 'messages' is right: add \"label\""),
        ({"prompt": "Q", "response": "A", "helpfulness": 4}, "no column says whether 'response' is right"),
        ({"text": "Q A", "label": [-100.0, 4.0]}, "'label' is .*, which does not say whether 'text' is right"),
        ({"dataset": "x", "context": "Q"}, "prompts without answers: make labelled ones by"),
        ({"x": 1}, "rename them, see docs/data.md, or give --data.layout_module"),
    ],
)
def test_rows_without_a_label_say_what_to_do(read, row, remedy):
    with pytest.raises(UserError, match=f"^data.jsonl line 1: no known format has the columns .*{remedy}"):
        read(row)


SAMPLE_FILES = {
    "trl_unpaired_standard.jsonl": ("unpaired", False),
    "ultrafeedback_kto_argilla.jsonl": ("unpaired", False),
    "kto_mix_14k.jsonl": ("unpaired", True),
    "kto_mix_15k_argilla.jsonl": ("unpaired", True),
    "axolotl_kto_intel.jsonl": ("unpaired", False),
    "ms_swift_kto.jsonl": ("unpaired", True),
    "openrlhf_kto_dylan.jsonl": ("unpaired", False),
    "halos_binary_feedback.json": ("unpaired", True),
    "implicit_prm_rollout.jsonl": ("unpaired", True),
    "oreo.jsonl": ("unpaired", False),
    "rlhflow_math500_test.jsonl": ("best_of_n", False),
}


@pytest.mark.parametrize("file", SAMPLE_FILES)
def test_samples(read_records, sample_rows, file):
    layout, chat = SAMPLE_FILES[file]
    name, records = read_records(sample_rows(file), apply_chat_template=chat)
    assert name == layout and all(one.prompt for one in records)
    of_rolls = [one for one in records if "rolls" in str(one.prompt)]
    assert all(one.answer_label == int("40" in one.steps[-1][-20:]) for one in of_rolls)


@pytest.mark.parametrize(
    "file, right",
    [
        ("gsm8k_example_model_solutions.jsonl", "gsm8k_example_model_solutions.jsonl"),
        ("llamafactory_kto_en_demo.json", "llamafactory_kto_en_demo.jsonl"),
        ("llamafactory_dpo_en_demo.json", "llamafactory_dpo_en_demo.jsonl"),
    ],
)
def test_samples_are_read_right(read_records, sample_rows, file, right):
    _, records = read_records(sample_rows(file), apply_chat_template=file.endswith(".json"))
    expected = sample_rows(f"right_reading/{right}")
    assert len(records) == len(expected)
    for one, row in zip(records, expected, strict=True):
        assert one.prompt == row["prompt"] and json.dumps(one.steps) == json.dumps(row["steps"])
        assert (one.step_labels, one.answer_label) == (row["step_labels"], row["answer_label"])
        assert one.complete == row["complete"]
