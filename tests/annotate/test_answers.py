"""What is read as an answer, and what is written of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer, write_jsonl

from pipa_openrlhf.annotate.answers import SampledAnswer, Verdict, labels_of, read_answers, split_steps, to_row
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.errors import UserError

SAMPLED = {
    "problem_id": "p",
    "sample": 1,
    "prompt": "1+1?",
    "completion": "1+1=2\n\n#### 2",
    "label": True,
    "answer": "2",
    "predicted": "2",
    "finished": True,
}


def read_one(tmp_path, row) -> SampledAnswer:
    [answer] = read_answers(write_jsonl(tmp_path / "rows.jsonl", [row]), "--annotate.input")
    return answer


def test_a_row_of_sample(tmp_path):
    answer = read_one(tmp_path, SAMPLED)
    assert (answer.key, answer.question, answer.steps) == (("p", 1), "1+1?", ["1+1=2\n", "#### 2"])
    assert (answer.is_right, answer.gold) == (True, "2")


@pytest.mark.parametrize(
    "row, steps, gold, right",
    [
        ({"problem": "q", "answer": "a\nb"}, ["a", "b"], None, None),
        ({"question": "q", "solution": "a", "answer": 3}, ["a"], "3", None),
        ({"question": "q", "steps": ["a", "b\nc"], "ground_truth": "7"}, ["a", "b\nc"], "7", None),
        ({"prompt": "q", "completions": ["a", "b"], "answer_label": 0}, ["a", "b"], None, False),
        ({"prompt": "q", "response": "a", "is_correct": 1, "gold": "x"}, ["a"], "x", True),
    ],
)
def test_other_names_of_columns(tmp_path, row, steps, gold, right):
    answer = read_one(tmp_path, row)
    assert (answer.steps, answer.gold, answer.is_right) == (steps, gold, right)
    assert (answer.problem_id, answer.sample) == ("q", 0)


def test_answers_without_a_number_are_counted(tmp_path):
    rows = [{"prompt": "q", "completion": text} for text in "abc"] + [{"prompt": "r", "completion": "a"}]
    answers = read_answers(write_jsonl(tmp_path / "rows.jsonl", rows), "--annotate.input")
    assert [one.key for one in answers] == [("q", 0), ("q", 1), ("q", 2), ("r", 0)]


BAD = [
    ({"completion": "a"}, "needs a text column"),
    ({"prompt": " ", "completion": "a"}, "needs a text column"),
    ({"prompt": "q"}, "needs the answer in `completion`"),
    ({"prompt": "q", "completion": None}, "needs the answer in `completion`"),
    ({"prompt": "q", "completion": ""}, "is empty"),
    ({"prompt": "q", "completion": 3}, "completion"),
    ({"prompt": "q", "completion": {"text": "a"}}, "completion"),
    ({"prompt": "q", "steps": []}, "'steps' has no steps"),
    ({"prompt": "q", "steps": ["a", ""]}, "'steps[1]' is empty"),
    ({"prompt": "q", "steps": ["a", 3]}, "'steps[1]' must be text"),
    ({"prompt": "q", "completion": "a", "label": "perhaps"}, "'label' is 'perhaps'"),
    ({"prompt": "q", "completion": "a", "label": 0.5}, "'label' is 0.5"),
    ({"prompt": "q", "completion": "a", "answer": ["4"]}, "the right answer is"),
    ({"prompt": "q", "completion": "a", "answer": True}, "the right answer is"),
    ({"prompt": "q", "completion": "a", "sample": "first"}, "`sample` is 'first'"),
    ({"prompt": "q", "completion": "a", "sample": True}, "`sample` is"),
    ({"prompt": "q", "completion": "half \ud800"}, "surrogate"),
    (["prompt", "q"], "line 1"),
]


@pytest.mark.parametrize("row, message", BAD, ids=lambda value: str(value)[:30])
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        read_one(tmp_path, row)
    text = str(caught.value)
    assert message in text and "rows.jsonl" in text and "line 1" in text and "\n" not in text


@pytest.mark.parametrize(
    "content, message", [("", "is empty"), ("\n\n", "is empty"), ("[]", "line 1"), ('{"prompt": "q', "line 1")]
)
def test_a_file_without_answers_is_refused(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_answers(str(tmp_path / "rows.jsonl"), "--annotate.input")
    with pytest.raises(UserError, match="--annotate.input .*none.jsonl: no such file"):
        read_answers(str(tmp_path / "none.jsonl"), "--annotate.input")


def test_the_same_answer_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 2: problem_id 'p' with sample 1 is also in .*line 1"):
        read_answers(write_jsonl(tmp_path / "rows.jsonl", [SAMPLED, SAMPLED]), "--annotate.input")


TAGGED = "<step>\n<p>\na\n\nb\n</p>\n</step>\n<step>\n<p>\nc\n</p>\n</step>"


def test_an_answer_in_tags_is_cut_after_them():
    assert split_steps(TAGGED) == ["<step>\n<p>\na\n\nb\n</p>\n</step>", "<step>\n<p>\nc\n</p>\n</step>"]


@given(st.lists(st.sampled_from(["a", "\n", "</step>", "<step>", " "]), max_size=8).map("".join))
def test_steps_are_the_answer_and_none_is_empty(text):
    steps = split_steps(text)
    assert "\n".join(steps) == text and (text == "" or all(steps))


def make_answer(right: bool | None, steps=("a", "b", "c")) -> SampledAnswer:
    return SampledAnswer("p", 0, "q?", list(steps), right, "2", "here")


@pytest.mark.parametrize(
    "right, verdict, labels",
    [
        (True, Verdict(1), [1, 1, 1]),  # all steps of a right answer are right
        (True, Verdict(-1, [-1.0, 0.0, 1.0]), [1, 1, 1]),
        (False, Verdict(1), [1, 0, 0]),
        (False, Verdict(-1), [1, 1, 0]),
        (False, Verdict(0), [0, 0, 0]),
        (False, Verdict(1, [0.5, 0.49, -1.0]), [1, 0, 0]),
        (False, Verdict(0, [0.0, 1.0, -1.0]), [0, 1, 0]),  # each step by its own value
        (None, Verdict(2), [1, 1, 0]),
        (None, Verdict(-1), [1, 1, 1]),
    ],
)
def test_labels_follow_the_paper(right, verdict, labels):
    assert labels_of(make_answer(right), verdict, 0.5) == [bool(one) for one in labels]


def loaded(tmp_path, rows, **changes):
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    config = parse("train_pipa", ["--data.annotation", "step", *words])
    return load_samples(config, make_tokenizer(), dataset=write_jsonl(tmp_path / "steps.jsonl", rows))


@pytest.mark.parametrize("format", ["stepwise", "alphamath"])
@pytest.mark.parametrize("with_values", [False, True])
def test_training_reads_the_labels_that_were_given(tmp_path, format, with_values):
    cases = [(True, Verdict(-1)), (False, Verdict(1)), (False, Verdict(-1)), (None, Verdict(2)), (None, Verdict(-1))]
    if with_values:
        cases = [(True, Verdict(-1, [-1.0, 0.0, 1.0])), (False, Verdict(0, [0.0, 0.75, -1.0]))]
    rows, expected = [], []
    for number, (right, verdict) in enumerate(cases):
        answer = make_answer(right, [f"x{number}", "yy", "z"])
        rows.append(to_row(answer, verdict, "rule", format, 0.5))
        expected.append(labels_of(answer, verdict, 0.5))
    found = loaded(tmp_path, rows)
    assert found.format == format and not found.dropped
    for sample, labels in zip(found.samples, expected, strict=True):
        by_step = {step: label for step, label in zip(sample.step_ids.tolist(), sample.labels.tolist())}
        assert [by_step[step] for step in range(3)] == [int(label) for label in labels]
        assert sample.answer_label == int(labels[-1]) and sample.mask.all()
    texts = [make_tokenizer().decode(one.input_ids) for one in found.samples]
    question = "q?" if format == "stepwise" else "<question> q? </question>\n"
    assert texts[1] == f"{question}x1\nyy\nz<|im_end|>"
    assert json.loads(json.dumps(rows)) == rows
