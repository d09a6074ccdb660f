"""Rows that look like one thing and are another: read right, or refused, never silently wrong."""

from datetime import datetime

import pytest

from pipa_openrlhf.data.tokenise import tokenise
from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}
CHAT = {"apply_chat_template": True}
DIALOGUE = "\n\nHuman: hi\n\nAssistant:"


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(read_records):
    def read(row: dict, **flags):
        return read_records([row], **flags)[1]

    return read


REFUSED = [
    ({"question": "Q", "answer": "2", "prediction": "3", "correct": False}, {}, "'answer' and 'prediction' may both"),
    ({"question": "Q", "answer": "2", "rollout": "3", "score": 0.0}, {}, "'answer' and 'rollout' may both be the"),
    ({"messages": [USER, assistant("a")], "chosen": "a", "rejected": "b"}, CHAT, "'messages' ends with one of the"),
    ({"messages": [USER, assistant("a ")], "response": "a", "label": 1}, CHAT, "the prompt ends with the answer"),
    ({"prompt": "Q", "chosen": ["a"], "rejected": ["b", "c"]}, {}, "one side is a list of several texts"),
    ({"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": -1}, {}, "is -1; give 0 or 1"),
    ({"prompt": "Q", "history": "U: hi", "chosen": "a", "rejected": "b"}, {}, "'history' is 'U: hi'"),
    ({"chosen": f"{DIALOGUE} a{DIALOGUE}", "rejected": f"{DIALOGUE} a{DIALOGUE} b"}, {}, "ends where its answer"),
    (
        {"input": {"messages": [USER], "tools": [{}]}, "preferred_output": "a", "non_preferred_output": "b"},
        CHAT,
        "'input.tools' is not empty",
    ),
    (
        {"question": {"problem": "Q"}, "label": {"steps": [{"completions": 5}]}},
        {"format": "prm800k"},
        "cannot be read",
    ),
    ({"prompt": "Q", "completion": "a", "label": 1, "weight": 10**400}, {}, "cannot be read as unpaired .OverflowErr"),
]


@pytest.mark.parametrize("row, flags, message", REFUSED)
def test_refused(read, row, flags, message):
    with pytest.raises(UserError, match=f"^data.jsonl line 1: .*{message}") as error:
        read(row, **flags)
    assert "; " in str(error.value)


def test_the_models_conversation_goes_before_a_reference(read):
    row = {"question": "1+1?", "answer": "2", "messages": [USER, assistant("3")], "is_correct": False}
    [record] = read(row, **CHAT)
    assert (record.steps, record.answer_label) == (["3"], 0)


@pytest.mark.parametrize(
    "beside", [{"system": "S", "question": "Q"}, {"prompt": [SYSTEM, USER]}, {"prompt": [USER]}, {"prompt": [SYSTEM]}]
)
def test_whole_conversations_do_not_repeat_the_prompt(read, beside):
    row = {**beside, "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
    for record, text in zip(read(row, **CHAT), "ab", strict=True):
        said = [message["content"] for message in [*record.prompt, *record.messages]]
        assert said == [*(["S"] if "S" in str(beside) else []), "Q", text]


def test_the_better_conversation_beside_the_two_is_not_their_prompt(read):
    whole = {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
    chosen, rejected = read({"messages": whole["chosen"], **whole}, **CHAT)
    assert chosen.prompt == rejected.prompt == [USER]


def test_a_question_before_the_tagged_steps_is_no_part_of_them(read):
    row = {"question": "1+1?", "input": "1+1? Step 1: it is 2 ки", "label": "1+1? Step 1: it is 2 +"}
    [record] = read(row)
    assert (record.prompt, record.steps, record.step_labels) == ("1+1?", ["Step 1: it is 2"], [1])


@pytest.mark.parametrize(
    "values, flags, labels",
    [
        (["1", "0", "-1"], {}, [1, None, 0]),
        ([0.0, -0.5, 0.5], {"step_threshold": 0.0}, [1, 0, 1]),
        ([0.0, 0.4, -1.0], {"step_threshold": 0.4}, [0, 1, 0]),
    ],
)
def test_values_and_signs(read, values, flags, labels):
    [record] = read({"prompt": "Q", "completions": ["a", "b", "c"], "labels": values}, **flags)
    assert record.step_labels == labels


def test_answers_to_different_questions_do_not_continue_each_other(read_records):
    rows = [{"question": f"Q{n}", "completions": ["Let me think."], "labels": [1]} for n in range(18)]
    rows += [{"question": f"R{n}", "completions": ["Let me think.", "x"], "labels": [1, 1]} for n in range(2)]
    _, records = read_records(rows)
    assert all(one.complete for one in records)


def test_a_timestamp_in_a_message(read):
    [record] = read({"prompt": [{**USER, "timestamp": datetime(2024, 1, 1)}], "completion": "a", "label": 1}, **CHAT)
    assert record.problem_id


def test_a_blank_problem_id_is_none(read):
    [record] = read({"prompt": "Q", "completion": "a", "label": 1, "problem_id": ""})
    assert record.problem_id == "Q"


def test_steps_as_sharegpt_messages(read):
    steps = [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]
    [record] = read({"prompt": [USER], "completions": steps, "labels": [1, 0]}, **CHAT)
    assert record.steps == ["a", "b"]


def test_a_text_history_is_the_prompt_of_shp_alone(read):
    post = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    assert read(post)[0].prompt == "Q"
    with pytest.raises(UserError, match="'history' is 'H'"):
        read({"prompt": "Q", "history": "H", "response_1": "a", "response_2": "b", "preference_strength": 1})


def test_only_a_complete_answer_ends_with_eos(read, tokenizers):
    row = {"prompt": "Q", "completions": ["a", "b"], "labels": [1, 0]}
    for prefixes, ends in (("true", 0), ("false", 1)):
        [sample], _ = tokenise(read(row, prefixes=prefixes), tokenizers["bytes"], max_len=99, annotation="step")
        assert sample.input_ids.tolist().count(tokenizers["bytes"].eos_token_id) == ends
        assert sample.labels.tolist()[-1] == 0
