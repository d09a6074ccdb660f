"""Bad rows: one line that names the file, the line, what is wrong and what to do."""

from copy import deepcopy

import pytest

from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.errors import UserError

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
GOOD = {
    "unpaired": {"prompt": "the", "completion": "cat", "label": 1},
    "paired": {"prompt": "the", "chosen": "cat", "rejected": "mat"},
    "stepwise": {"prompt": "the", "completions": ["cat", "sat"], "labels": [1, 0]},
    "alphamath": {"instruction": "the", "output": [{"step": "cat", "Q": 0.2}, {"step": "sat", "Q": -1}]},
}
STEP = {"step": "cat", "Q": 0.2}
LAST = {"step": "sat", "Q": 1}

TEXT_CASES = [
    ("unpaired", {"label": "maybe"}, "'label' is 'maybe'; a label is true/false, 1/0"),
    ("unpaired", {"label": None}, "'label' is null"),
    ("unpaired", {"label": 2}, "'label' is 2"),
    ("unpaired", {"label": -2}, "'label' is -2"),
    ("unpaired", {"label": 0.5}, "'label' is 0.5"),
    ("unpaired", {"label": float("nan")}, "'label' is nan"),
    ("unpaired", {"label": [1]}, "'label' is [1]"),
    ("unpaired", {"label": ...}, "no column 'label'"),
    ("unpaired", {"prompt": ...}, "no column 'prompt'"),
    ("unpaired", {"prompt": None}, "'prompt' is null"),
    ("unpaired", {"prompt": 3}, "'prompt' is 3; a prompt is text or a list of messages"),
    ("unpaired", {"prompt": ["a"]}, "'prompt' is ['a']"),
    ("unpaired", {"prompt": [USER]}, "'prompt' holds messages; add --data.apply_chat_template"),
    ("unpaired", {"completion": ...}, "no column 'completion'"),
    ("unpaired", {"completion": ""}, "'completion' is empty"),
    ("unpaired", {"completion": None}, "'completion' is null"),
    ("unpaired", {"completion": 3}, "'completion' is 3"),
    ("unpaired", {"completion": []}, "'completion' has no steps"),
    ("unpaired", {"completion": [USER, ASSISTANT]}, "'completion' holds messages; add --data.apply_chat_template"),
    ("unpaired", {"completion": "half \ud83d of it"}, "half of a surrogate pair"),
    ("unpaired", {"problem_id": 1.5}, "'problem_id' is 1.5"),
    ("paired", {"chosen": ...}, "no column 'chosen'"),
    ("paired", {"rejected": ...}, "no column 'rejected'"),
    ("paired", {"chosen": ""}, "'chosen' is empty"),
    ("paired", {"rejected": None}, "'rejected' is null"),
    ("paired", {"rejected": []}, "'rejected' has no steps"),
    ("paired", {"rejected": ["a", ""]}, "'rejected[1]' is empty"),
    ("paired", {"rejected": ["a", "b"], "rejected_labels": [1]}, "1 'rejected_labels' for 2 steps"),
    ("paired", {"rejected": ["a"], "rejected_labels": ["so"]}, "'rejected_labels[0]' is 'so'"),
    ("paired", {"chosen": ["a"], "chosen_labels": [1, 1]}, "2 'chosen_labels' for 1 steps"),
    ("stepwise", {"labels": [1]}, "1 'labels' for 2 steps; give one label a step"),
    ("stepwise", {"labels": [1, None]}, "'labels[1]' is null"),
    ("stepwise", {"labels": 1}, "'labels' is 1"),
    ("stepwise", {"labels": ...}, "no column 'labels'"),
    ("stepwise", {"completions": []}, "'completions' has no steps"),
    ("stepwise", {"completions": "cat"}, "'completions' is 'cat'; give a list"),
    ("stepwise", {"completions": ["cat", 3]}, "'completions[1]' must be text, it is a number"),
    ("stepwise", {"completions": [ASSISTANT, USER]}, "'completions[1]' is a user message"),
    ("stepwise", {"prompt": ...}, "no column 'prompt'"),
    ("alphamath", {"output": []}, "'output' has no steps"),
    ("alphamath", {"output": "not json"}, "'output' is no JSON"),
    ("alphamath", {"output": "3"}, "'output' is 3; give a list of steps"),
    ("alphamath", {"output": ["cat"]}, "'output' is ['cat']"),
    ("alphamath", {"output": None}, "'output' is null"),
    ("alphamath", {"output": [{"Q": 1}]}, "'output[0].step' must be text, it is null"),
    ("alphamath", {"output": [{**STEP, "Q": float("nan")}, LAST]}, "'output[0].Q' is nan; Q is a number from -1 to 1"),
    ("alphamath", {"output": [{**STEP, "Q": 1.5}, LAST]}, "'output[0].Q' is 1.5"),
    ("alphamath", {"output": [{**STEP, "Q": -2}, LAST]}, "'output[0].Q' is -2"),
    ("alphamath", {"output": [{**STEP, "Q": "high"}, LAST]}, "'output[0].Q' is 'high'"),
    ("alphamath", {"output": [{**STEP, "Q": True}, LAST]}, "'output[0].Q' is True"),
    ("alphamath", {"output": [{"step": "cat"}, LAST]}, "'output[0].Q' is null"),
    ("alphamath", {"output": [LAST, STEP]}, "the last step has Q 0.2; it must be 1 (right answer) or -1 (wrong)"),
    ("alphamath", {"instruction": ""}, "'instruction' is empty"),
    ("alphamath", {"instruction": 5}, "'instruction' must be text"),
]

CHAT_CASES = [
    ({"chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "'chosen' has no prompt; start it with the user's message"),
    ({"chosen": "cat", "rejected": "mat"}, "--data.apply_chat_template needs a prompt"),
    ({"chosen": [USER], "rejected": [USER]}, "'chosen' ends with a user message"),
    ({"chosen": [USER, {"role": "assistant"}], "rejected": []}, "chosen[1]: no column 'content'"),
    ({"chosen": [USER, {"role": "assistant", "content": ""}], "rejected": []}, "'chosen[1].content' is empty"),
    ({"chosen": [USER, {"role": 3, "content": "A"}], "rejected": []}, "'chosen[1].role' must be text"),
    ({"chosen": [USER, "A"], "rejected": []}, "'chosen[1]' is 'A'"),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "R"}, ASSISTANT]},
        "'rejected' does not start with the prompt of 'chosen'",
    ),
    ({"chosen": [USER, {"role": "assistant", "content": None}], "rejected": []}, "chosen[1]: 'content' is null"),
    ({"chosen": [USER, {"role": "tool", "content": "t"}], "rejected": []}, "'chosen' ends with a tool message"),
    (
        {"chosen": [USER, {"role": "assistant", "content": None, "tool_calls": []}], "rejected": []},
        "chosen[1]: 'content' is null",
    ),
    ({"chosen": [USER, {"role": "assistant", "content": None, "tool_calls": "f()"}], "rejected": []}, "is 'f()'"),
    (
        {"chosen": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}], "rejected": []},
        "a function's name",
    ),
    ({"prompt": [], "completion": [ASSISTANT], "label": 1}, "'prompt' is []"),
]


def change(row: dict, changes: dict) -> dict:
    """The row with values replaced, or removed where the new one is ``...``."""
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def refusal(args, tokenizer, path: str) -> str:
    with pytest.raises(UserError) as error:
        load_samples(args, tokenizer, dataset=path)
    message = str(error.value)
    assert "\n" not in message
    assert "; " in message, "says what to do"
    return message


@pytest.mark.parametrize("kind, changes, problem", TEXT_CASES)
def test_bad_rows(kind, changes, problem, make_args, tokenizers, write_rows):
    good = GOOD[kind]
    path = write_rows([good, good, change(good, changes)])
    message = refusal(make_args(), tokenizers["bytes"], path)
    assert message.startswith(f"{path} line 3: ")
    assert problem in message


@pytest.mark.parametrize("row, problem", CHAT_CASES)
def test_bad_conversations(row, problem, make_args, chat, write_rows):
    path = write_rows([row])
    message = refusal(make_args(apply_chat_template=True), chat, path)
    assert message.startswith(f"{path} line 1: ")
    assert problem in message


def test_a_named_prompt_column_must_exist(make_args, tokenizers, write_rows):
    path = write_rows([GOOD["paired"]])
    with pytest.raises(UserError, match=r"line 1: no column 'question' \(columns: prompt, chosen, rejected\)"):
        load_samples(make_args(prompt_key="question"), tokenizers["bytes"], dataset=path)


def test_unknown_columns_name_what_there_is_and_what_is_needed(make_args, tokenizers, write_rows):
    path = write_rows([{"query_text": "Q", "reply": "A"}])
    with pytest.raises(UserError) as error:
        load_samples(make_args(), tokenizers["bytes"], dataset=path)
    assert f"{path} line 1: no known format has the columns query_text, reply" in str(error.value)
    assert "unpaired (completion and label)" in str(error.value)


@pytest.mark.parametrize("kind", ["unpaired", "paired"])
def test_step_annotation_needs_step_labels(kind, make_args, tokenizers, write_rows):
    path = write_rows([GOOD[kind]])
    with pytest.raises(UserError, match="line 1: --data.annotation step, but this answer has no step labels"):
        load_samples(make_args(annotation="step"), tokenizers["bytes"], dataset=path)


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"apply_chat_template": True}, "the tokenizer has none"),
        ({"input_template": "{} {}"}, r"--data\.input_template"),
        ({"input_template": "{} {name}"}, r"--data\.input_template"),
        ({"input_template": "{} {"}, r"--data\.input_template"),
    ],
)
def test_bad_flags(flags, problem, make_args, tokenizers, write_rows):
    with pytest.raises(UserError, match=problem):
        load_samples(make_args(**flags), tokenizers["bytes"], dataset=write_rows([GOOD["unpaired"]]))


def test_a_tokenizer_without_eos(make_args, tokenizers, write_rows):
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no eos token"):
        load_samples(make_args(), tokenizer, dataset=write_rows([GOOD["unpaired"]]))
