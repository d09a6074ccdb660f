"""Single labelled answers and lists of answers, by what the rows say and against samples of public files."""

import importlib
import json
from pathlib import Path

import pytest

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.json_rows import read_json_rows
from pipa_openrlhf.data.layouts import LAYOUTS
from pipa_openrlhf.errors import UserError

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SAMPLES = DATA / "layouts"
Q = "What is 1+1?"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(read_records):
    """Layout and what training sees of each record: prompt, steps, label."""

    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        assert all(one.step_labels is None and one.label_source == "a column of labels" for one in records)
        return name, [(one.prompt, one.steps, one.answer_label) for one in records]

    return read


@pytest.mark.parametrize(
    "row, label",
    [
        ({"prompt": Q, "completion": "2", "label": True}, 1),
        ({"score": False, "response": "2", "instruction": Q}, 0),  # 0.9's KTO data
        ({"prompt": Q, "response": "2", "reward": 0}, 0),  # OREO
        ({"input": Q, "output": "2", "gts": "2", "score": 1.0, "step": 3}, 1),  # verl's dump
        ({"prompt": Q, "output": "2", "score": -1.0, "acc": False}, 0),
        ({"prompt": Q, "responses": "2", "reward": 1.0}, 1),
        ({"instruction": Q, "input": None, "output": "2", "kto_tag": True}, 1),  # LLaMA-Factory's
        ({"prompt": Q, "completion": "2", "label": "desirable"}, 1),
        ({"prompt": Q, "completion": "2", "label": "Rejected"}, 0),
        ({"question": Q, "answer": "2", "label": 1}, 1),
        ({"problem": Q, "solution": "2", "is_correct": "false"}, 0),
        ({"problem": Q, "solution": "the reference", "answer": "3", "response": "2", "correct": True}, 1),
        ({"prompt": Q, "completion": "2", "label": True, "score": 8.5, "rating": 4.0}, 1),
    ],
)
def test_one_answer_under_public_names(read, row, label):
    assert read(row) == ("unpaired", [(Q, ["2"], label)])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(Q), assistant("2")], "label": True},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": "2"}], "kto_tag": True},
        {"prompt": Q, "completion": [user(Q), assistant("2")], "label": True, "rating": 4.0},  # argilla's mix
        {
            "prompt": [user(Q)],
            "output": [assistant("2")],
            "label": 1,
            "reward": 1.0,
            "type": "binary_feedback",
        },  # HALOs
        {"prompt": [user(Q)], "response": [assistant("2")], "label": 1},
        {"prompt": Q, "completion": [assistant("2")], "label": 1},
    ],
)
def test_conversations(read_records, row):
    name, [one] = read_records([row], apply_chat_template=True)
    assert (name, one.prompt, one.steps, one.answer_label) == ("unpaired", [user(Q)], ["2"], 1)
    assert one.messages == [assistant("2")]


@pytest.mark.parametrize(
    "who, says, call, answer",
    [("from", "value", "function_call", "observation"), ("role", "content", "tool_call", "tool_response")],
)
def test_tool_calls_as_turns_of_their_own(read_records, who, says, call, answer):
    asked = {"name": "add", "arguments": {"a": 1, "b": 1}}
    turns = [("user", Q), (call, json.dumps(asked)), (answer, "2"), ("assistant", "It is 2.")]
    row = {"messages": [{who: name, says: text} for name, text in turns], "label": True}
    _, [one] = read_records([row], apply_chat_template=True)
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": asked}]}
    assert one.prompt == [user(Q), called, {"role": "tool", "content": "2"}]
    assert one.messages == [assistant("It is 2.")]
    row["messages"][1][says] = "add(1, 1)"
    message = "line 1: 'messages\\[1\\]' is a call, but its content is 'add\\(1, 1\\)'; give JSON with 'name'"
    with pytest.raises(UserError, match=message):
        read_records([row], apply_chat_template=True)


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_the_system_text_beside_a_whole_conversation(read_records, column):
    turns = [user(Q), assistant("2"), user("Sure?"), assistant("Yes")]
    row = {"system": "S", "prompt": Q, column: turns, "label": 0}
    _, [one] = read_records([row], apply_chat_template=True)
    assert one.prompt == [{"role": "system", "content": "S"}, *turns[:-1]]
    assert (one.messages, one.answer_label) == ([turns[-1]], 0)


def test_system_and_input_of_text(read):
    row = {"system": "S", "question": Q, "input": "more", "completion": "2", "label": True}
    assert read(row) == ("unpaired", [(f"S\n\n{Q}\nmore", ["2"], 1)])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": Q, "completion": "2", "label": "fine"}, "'label' is 'fine'; a label is"),
        ({"prompt": Q, "completion": "2", "label": 3}, "'label' is 3; a label is"),
        (
            {"prompt": Q, "response": "2", "output": "3", "label": 1},
            "'response' and 'output' may both be the answer; na",
        ),
        ({"problem": Q, "solution": "2", "answer": "3", "label": 1}, "'solution' and 'answer' may both be"),
        # A reference answer that is called label, as some frameworks do.
        (
            {"prompt": Q, "response": "2", "label": "1", "reward": 0},
            "the labels disagree: 'label' '1' and 'reward' 0; n",
        ),
        ({"messages": [user(Q), assistant("2")], "label": 1}, "'messages' holds messages; add --data.apply_chat_te"),
        (
            {"prompt": Q, "responses": ["2", "3"], "label": 0},
            "one label for 2 'responses'; give a list with one label",
        ),
        # These may be steps.
        ({"prompt": Q, "response": ["1+1", "2"], "label": [1, 0]}, "'label' is \\[1, 0\\], which is no label"),
        ({"problem": Q, "steps": ["1+1", "2"], "labels": [1, 0], "answer": "2", "is_correct": True}, ""),
        ({"completion": "2", "label": 1}, "no column 'prompt'"),
        ({"prompt": Q, "completion": "", "label": 1}, "'completion' is empty"),
    ],
)
def test_bad_rows(read, row, message):
    with pytest.raises(UserError, match="line 1: " + message):
        read(row)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [assistant("2")], "label": 1}, "'messages' has no prompt; start it with"),
        ({"messages": [user(Q)], "label": 1}, "'messages' ends with a user message"),
        (
            {"messages": [user(Q), assistant("2")], "response": "2", "label": 1},
            "the prompt ends with the answer, 'response'; name a prompt without it",
        ),
    ],
)
def test_bad_conversations(read_records, row, message):
    with pytest.raises(UserError, match="line 1: " + message):
        read_records([row], apply_chat_template=True)


@pytest.mark.parametrize("others", [{}, {"score": 1}])
def test_a_row_without_its_label(read_records, others):
    rows = [{"prompt": Q, "completion": "2", "label": label, **others} for label in (True, None)]
    with pytest.raises(UserError, match="line 2: 'label' is null; give it a value or remove the row"):
        read_records(rows)


def test_flags_name_the_label(read):
    row = {"prompt": Q, "response": "2", "label": "1", "reward": 0}
    assert read(row, label_key="reward")[1] == [(Q, ["2"], 0)]
    assert read({"prompt": Q, "response": "2", "good": "no"}, label_key="good")[1] == [(Q, ["2"], 0)]


TWO = [(Q, ["2"], 1), (Q, ["3"], 0)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "answers": ["2", "3"], "labels": [1, 0]},
        {"prompt": Q, "responses": ["2", "3"], "scores": [1.0, 0.0]},
        {"prompt": Q, "completions": ["2", "3"], "correctness": [True, False], "steps": [["2"], ["3"]]},
        {
            "problem": Q,
            "solution": "r",
            "answer": "2",
            "generations": ["2", "3"],
            "correctness_math_verify": [True, False],
        },
        {"problem": Q, "responses": [{"text": "2", "is_correct": True}, {"text": "3", "is_correct": False}]},
        {"problem": Q, "answer": "2", "solutions": [{"solution": "2", "correct": 1}, {"solution": "3", "correct": 0}]},
        {"problem": Q, "generations": [{"label": "+", "response": "2"}, {"label": "-", "response": "3"}]},
    ],
)
def test_lists_of_answers(read, row):
    assert read(row) == ("answers", TWO)


def test_answers_with_labelled_steps_are_not_whole_ones(read_records):
    one = {"text": "a\nb", "steps": ["a", "b"], "step_labels": [1, 0], "is_correct": False}
    name, [record] = read_records([{"problem": Q, "responses": [one]}])
    assert (name, record.steps, record.step_labels) == ("rollouts", ["a", "b"], [1, 0])


def test_a_truncated_generation_is_a_beginning(read_records):
    row = {"problem": Q, "generations": ["2", "3"], "correctness_math_verify": [True, False]}
    _, records = read_records([{**row, "is_reasoning_complete": [True, False]}])
    assert [one.complete for one in records] == [True, False]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": Q, "answers": ["2", "3"], "labels": [1]}, "1 'labels' for 2 answers; give one label an answer"),
        ({"prompt": Q, "answers": ["2", "3"], "labels": [1, 7]}, "'labels\\[1\\]' is 7; a label is"),
        ({"prompt": Q, "answers": ["2", ""], "labels": [1, 0]}, "'answers\\[1\\]' is empty"),
        (
            {"prompt": Q, "responses": [{"text": "2", "is_correct": "?"}]},
            "'responses\\[0\\].is_correct' is '\\?'; a label is",
        ),
        (
            {"prompt": Q, "responses": [{"text": "2", "is_correct": True}, {"text": "3", "is_correct": None}]},
            "responses\\[1\\]: 'is_correct' is null; give it a value",
        ),
    ],
)
def test_bad_lists(read, row, message):
    with pytest.raises(UserError, match="line 1: " + message):
        read(row)


def test_best_of_n_has_to_be_named(read):
    row = {"prompt": Q, "completions": ["2", "3"], "labels": [True, False]}
    assert read(row, format="best_of_n") == ("best_of_n", TWO)
    whole = {"prompt": Q, "completions": ["The answer is 2", "The answer is 3"], "labels": [True, False]}
    with pytest.raises(UserError, match="whole answers, not the steps of one; say which it is by --data.format best"):
        read(whole)


class TestResampled:
    ROW = {
        "chunk_removed": "x",
        "prefix_without_chunk": "It is",
        "rollout": " 1+1. So \\boxed{2}",
        "full_cot": f"{Q} <think>\nIt is 1+1. So \\boxed{{2}}",
        "answer": "2",
        "is_correct": True,
    }

    def test_the_prompt_is_what_stands_before_the_rollout(self, read):
        expected = [(f"{Q} <think>\nIt is", [" 1+1. So \\boxed{2}"], 1)]
        assert read(self.ROW) == ("resampled", expected)
        first = {"prompt": f"{Q} <think>\n", "solution": "Hm.", "full_cot": f"{Q} <think>\nHm.", "answer": ""}
        assert read({**first, "is_correct": False}) == ("resampled", [(f"{Q} <think>\n", ["Hm."], 0)])

    def test_one_without_a_final_answer_is_a_beginning(self, read_records):
        _, [one] = read_records([self.ROW])
        assert one.complete
        _, [one] = read_records([{**self.ROW, "full_cot": "Q Hm", "rollout": "Hm", "is_correct": False}])
        assert not one.complete

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"full_cot": "Q"}, "'full_cot' does not end with 'rollout'; correct it"),
            ({"rollout": None}, "'rollout' is null; give it a value"),
            ({"is_correct": None}, "'is_correct' is null; give it a value"),
        ],
    )
    def test_bad_rows(self, read, change, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read({**self.ROW, **change})


def test_a_column_for_each_model(read):
    row = {"question": Q, "ground_truth": "2", "b": {"is_correct": False, "solution": "1+1=3\nA: 3"}}
    row["a"] = {"solution": "2", "is_correct": True}
    assert read(row) == ("model_solutions", [(Q, ["1+1=3", "A: 3"], 0), (Q, ["2"], 1)])
    with pytest.raises(UserError, match="line 1: 'b.is_correct' is None|'b.is_correct' is null; a label is"):
        read({**row, "b": {"is_correct": None, "solution": "3"}})


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": Q, "answer": "1+1=2\n#### 2"}, "reference solutions \\('answer'\\) .*; python -m .*cli.sample"),
        ({"problem": Q, "solution": "2", "answer": "2", "level": 1}, "reference solutions .*; python -m .*cli.sample"),
        ({"instruction": Q, "input": "", "output": "2"}, "answers \\('output'\\) that have no label; add 'label'"),
        ({"messages": [user(Q), assistant("2")]}, "answers \\('messages'\\) that have no label; add 'label'"),
        ({"prompt": Q, "response": "2", "score": 8.5}, "'score' is 8.5, which is no label of 'response'; a label is"),
        (
            {"prompt": [user(Q)], "reward_model": {"ground_truth": "2"}},
            "prompts only \\('prompt'\\), no answers; pyth",
        ),
        (
            {"prompt": Q, "response": "2", "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1},
            "coherence, correctness, helpfulness are scores of single answers.*; take the data set's comparisons",
        ),
        ({"text": Q, "label": [-100.0, 4.0]}, "'label' rates the turns of 'text' by several attributes"),
    ],
)
def test_unlabelled_rows_are_told_so(read, row, message):
    with pytest.raises(UserError, match="line 1: .*" + message):
        read(row)


@pytest.mark.parametrize(
    "file, chat", [("gsm8k_example_model_solutions.jsonl", False), ("llamafactory_kto_en_demo.json", True)]
)
def test_samples_are_read_right(read_records, sample_rows, file, chat):
    _, records = read_records(sample_rows(file), apply_chat_template=chat)
    keys = ("prompt", "steps", "step_labels", "answer_label", "complete")
    right = sample_rows(f"right_reading/{Path(file).stem}.jsonl")
    assert [{key: getattr(one, key) for key in keys} for one in records] == [
        {key: row[key] for key in keys} for row in right
    ]
    theirs = [row["problem_id"] for row in right]
    assert [theirs.index(one) for one in theirs] == [
        [other.problem_id for other in records].index(one.problem_id) for one in records
    ]


SINGLE = "trl_unpaired_standard trl_unpaired_conv ultrafeedback_kto_argilla kto_mix_14k kto_mix_15k_argilla".split()
SINGLE += "axolotl_kto_intel ms_swift_kto openrlhf_kto_dylan implicit_prm_rollout oreo".split()


@pytest.mark.parametrize("file", [*(f"{name}.jsonl" for name in SINGLE), "halos_binary_feedback.json"])
def test_samples_of_single_answers(read_records, sample_rows, file):
    """Right and wrong answers take turns in them."""
    rows = sample_rows(file)
    name, records = read_records(rows, apply_chat_template=True)
    assert (name, len(records)) == ("unpaired", len(rows))
    assert [one.answer_label for one in records] == [1, 0] * (len(rows) // 2)
    for row, one in zip(rows, records, strict=True):
        assert one.prompt[-1]["role"] == "user" and one.prompt[-1]["content"] in _texts(row)
        assert len(one.steps) == 1 and one.complete
        assert (one.prompt[0]["role"] == "system") == ("system" in row)


def _texts(value: object) -> list:
    """Every text in a row."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(text for item in items for text in _texts(item))]


@pytest.mark.parametrize("file", ["gsm8k/test.jsonl", "math500/test.jsonl"])
def test_problems_are_refused(read_records, file):
    if not (DATA / file).exists():
        pytest.skip("the sample files are not at hand")
    with pytest.raises(UserError, match="line 1: problems with reference solutions .*; python -m .*cli.sample"):
        read_records([row for _, row in read_json_rows(str(DATA / file))][:100])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_example_fits_its_layout_only_and_is_read(read_records, name):
    row = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").EXAMPLE
    flags = {"format": name} if name == "best_of_n" else {}
    fitting = [
        other
        for other in LAYOUTS
        if importlib.import_module(f"pipa_openrlhf.data.layouts.{other}").fits(row, DataConfig())
    ]
    assert fitting == (["stepwise"] if name == "best_of_n" else [name])
    found, records = read_records([row], **flags)
    assert found == name
    assert records
