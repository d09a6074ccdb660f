"""Layouts of step-labelled answers, compared with what the rows say by hand."""

import copy
import math

import pytest

from pipa_openrlhf.errors import UserError

Q = "What is 1+1+1?"


def rated(*ratings, texts="abcdefg", chosen=None, human=None) -> dict:
    completions = [{"text": text, "rating": rating, "flagged": False} for text, rating in zip(texts, ratings)]
    human = human and {"text": human, "rating": None, "source": "human", "flagged": False}
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def prm800k(*steps, finish="solution") -> dict:
    label = {"steps": list(steps), "total_time": 1, "finish_reason": finish}
    return {"labeler": "x", "question": {"problem": Q, "ground_truth_answer": "3"}, "label": label}


class TestPRM800K:
    def test_every_completion_that_is_not_continued_is_a_record(self, read):
        row = prm800k(
            rated(1, -1, texts="ab", chosen=0),
            rated(-1, texts="c", human="h"),
            rated(1, 1, texts=["x", "So.\n\n# Answer\n\n3"], chosen=1),
        )
        name, records = read(row)
        assert name == "prm800k"
        assert records == [
            (["b"], [0], None, False),
            (["a", "c"], [1, 0], None, False),
            (["a", "h", "x"], [1, 1, 1], None, False),
            (["a", "h", "So.\n\n# Answer\n\n3"], [1, 1, 1], 1, True),
        ]

    @pytest.mark.parametrize("neutral, label", [("mask", None), ("positive", 1), ("negative", 0)])
    def test_neutral(self, read, neutral, label):
        row = prm800k(rated(0, texts="a", chosen=0), rated(-1, texts=["# Answer\n\n4"], chosen=0))
        assert read(row, neutral_step=neutral)[1] == [(["a", "# Answer\n\n4"], [label, 0], 0, True)]

    def test_neutral_is_said(self, read_records, caplog):
        with caplog.at_level("INFO"):
            read_records([prm800k(rated(0, chosen=0))])
        assert "steps rated neutral (0) are taken as --data.neutral_step mask says" in caplog.text

    def test_a_completion_without_rating_has_no_label(self, read):
        assert read(prm800k(rated(None, texts="a", chosen=0)))[1] == [(["a"], [None], None, False)]

    @pytest.mark.parametrize("chosen, path", [(0.0, ["a", "x"]), (1.0, ["b", "x"]), (math.nan, None)])
    def test_the_number_of_a_table(self, read, chosen, path):
        _, records = read(prm800k(rated(1, -1, texts="ab", chosen=chosen), rated(1, texts="x", chosen=0)))
        assert records[-1][0] == (path or ["b"])

    def test_the_path_ends_where_nothing_was_chosen(self, read):
        nothing = {"completions": None, "human_completion": None, "chosen_completion": None}
        row = prm800k(rated(1, texts="a", chosen=0), rated(-1, texts="b"), nothing, finish="found_error")
        assert read(row)[1] == [(["a", "b"], [1, 0], None, False), (["a"], [1], None, False)]
        assert read(prm800k(rated(1, texts="a", chosen=0), nothing, finish="give_up"))[1] == [
            (["a"], [1], None, False)
        ]

    @pytest.mark.parametrize(
        "step, message",
        [
            (rated(1, chosen=3), "'label.steps\\[0\\].chosen_completion' is 3, of 1 completions; correct it"),
            (rated(1, 1, chosen=True), "'label.steps\\[0\\].chosen_completion' is True, of 2 completions; correct"),
            (rated(1, 1, chosen=0.5), "'label.steps\\[0\\].chosen_completion' is 0.5, of 2 completions; correct"),
            (rated(2), "'label.steps\\[0\\].completions\\[0\\].rating' is 2; a rating is -1, 0, 1 or null"),
            ("a", "'label.steps\\[0\\]' is 'a'; give an object"),
        ],
    )
    def test_bad_rows(self, read, step, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read(prm800k(step))


class TestRatedSteps:
    ROW = {
        "problem": Q,
        "steps": [{"step": "a", "rating": 0}, {"step": "b", "rating": 1}, {"step": "c", "rating": -1}],
    }

    def test_ratings(self, read):
        assert read(self.ROW) == ("rated_steps", [(["a", "b", "c"], [None, 1, 0], 0, True)])
        assert read(self.ROW, neutral_step="positive")[1][0][1] == [1, 1, 0]
        assert read({**self.ROW, "answer_label": True})[1][0][2] == 1

    def test_a_label_0_is_wrong_and_a_score_has_a_threshold(self, read):
        steps = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
        assert read({"prompt": Q, "steps": steps})[1] == [(["a", "b"], [1, 0], 0, True)]
        steps = [{"text": "a", "score": 0.75}, {"text": "b", "score": 0.25}]
        assert read({"prompt": Q, "steps": steps})[1] == [(["a", "b"], [1, 0], 0, True)]

    def test_bad_rating(self, read):
        with pytest.raises(UserError, match="^data.jsonl line 1: 'steps\\[0\\].rating' is 'meh'; a label is"):
            read({"problem": Q, "steps": [{"step": "a", "rating": "meh"}]})


class TestTagged:
    TEXT = f"{Q} Step 1: 1+1=2 ки\nStep 2: It is 4 ки"
    SIGNS = f"{Q} Step 1: 1+1=2 +\nStep 2: It is 4 -"
    STEPS = ["Step 1: 1+1=2", "Step 2: It is 4"]

    @pytest.mark.parametrize(
        "labels",
        [{"label": SIGNS}, {"value": ["+", "-"]}, {"value": [0.9, 0.1]}, {"labels": [1, 0]}, {"label": SIGNS + "\n"}],
    )
    def test_ways_to_label(self, read, read_records, labels):
        row = {"task": "GSM8K", "input": self.TEXT, **labels}
        assert read(row) == ("tagged", [(self.STEPS, [1, 0], 0, True)])
        (record,) = read_records([row])[1]
        assert (record.prompt, record.problem_id) == (Q, Q)

    def test_openrlhf_flags(self, read):
        row = {"input": self.TEXT, "value": [0.75, 0.5]}
        flags = {"input_key": "input", "label_key": "value", "placeholder_token": "ки"}
        assert read(row, **flags)[1] == [(self.STEPS, [1, 1], 1, True)]
        assert read(row, **flags, step_threshold=0.6)[1] == [(self.STEPS, [1, 0], 0, True)]

    def test_a_tag_of_ones_own(self, read):
        row = {"input": self.TEXT.replace("ки", "<end>"), "label": self.SIGNS}
        assert read(row, placeholder_token="<end>")[1] == [(self.STEPS, [1, 0], 0, True)]

    def test_question_and_process(self, read, read_records):
        row = {"question": Q, "process": "1+1=2 ки\nIt is 4 ки", "labels": [1, 0]}
        assert read(row) == ("tagged", [(["1+1=2", "It is 4"], [1, 0], 0, True)])
        assert read_records([row])[1][0].prompt == Q
        assert read({**row, "process": "1+1=2\n\n\n\n\nIt is 4\n\n\n\n\n", "labels": ["+", "-"]})[1][0][1] == [1, 0]

    def test_what_stands_after_the_last_tag_has_no_label(self, read):
        row = {"input": self.TEXT + "\nStep 3: So", "value": ["+", "-"]}
        assert read(row)[1] == [([*self.STEPS, "Step 3: So"], [1, 0, None], None, True)]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"value": ["+"]}, "1 'value' for 2 steps; give one label a step"),
            ({"value": ["+", "?"]}, "'value\\[1\\]' is '\\?'; a label is"),
            ({"label": SIGNS.replace("-", "*")}, "'label' is not the same text with \\+ or - in place of the tags"),
            ({"label": SIGNS.replace("It is 4", "It is 5")}, "'label' is not the same text"),
            ({"label": SIGNS[:-2]}, "'label' is not the same text"),
            ({"input": f"{Q} 1+1=2 ки", "value": ["+"]}, "'input' does not say by \"Step 1\".*--data.prompt_key"),
            ({"input": f"{Q} Step 1: a ки ки", "value": ["+", "-"]}, "'input\\[1\\]' is empty"),
        ],
    )
    def test_bad_rows(self, read, change, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read({"input": self.TEXT, **change})


class TestFirstError:
    PROCESSBENCH = {
        "id": "x-0",
        "generator": "g",
        "problem": Q,
        "steps": ["a", "b", "c"],
        "final_answer_correct": False,
    }
    MISTAKE = {"input": Q, "steps": ["a", "b", "c"], "answer": "4", "target": "3", "mistake_index": 1}
    MR = {
        "uuid": "u",
        "question": Q,
        "model_output_steps": ["a", "b", "c"],
        "model_output_answer_correctness": "incorrect",
        "model_output_solution_correctness": "incorrect",
        "model_output_solution_first_error_step": 2,
    }
    PRM = {
        "original_question": Q,
        "modified_question": "Changed?",
        "original_process": ["a", "b"],
        "modified_process": ["a", "x", "y"],
        "error_steps": [2],
    }

    @pytest.mark.parametrize("first, labels", [(-1, [1, 1, 1]), (0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0])])
    def test_processbench(self, read, first, labels):
        expected = ("first_error", [(["a", "b", "c"], labels, 0, True)])
        assert read({**self.PROCESSBENCH, "label": first}) == expected

    def test_the_steps_after_may_be_left_out(self, read):
        assert read({**self.PROCESSBENCH, "label": 1}, after_first_error="mask")[1][0][1] == [1, 0, None]

    @pytest.mark.parametrize("right, label", [(True, 1), (False, 0), (None, None)])
    def test_the_answer_has_its_own_label(self, read, right, label):
        assert read({**self.PROCESSBENCH, "label": 1, "final_answer_correct": right})[1][0][2] == label

    @pytest.mark.parametrize(
        "change, labels, answer",
        [
            ({}, [1, 0, 0], 0),
            ({"mistake_index": None}, [1, 1, 1], 0),
            ({"answer": " 3"}, [1, 0, 0], 1),
            ({"mistake_index": 1.0, "answer": 3}, [1, 0, 0], 1),
            ({"answer": None}, [1, 0, 0], 0),
            ({"target": None}, [1, 0, 0], None),
        ],
    )
    def test_mistake(self, read, change, labels, answer):
        assert read({**self.MISTAKE, **change}) == ("first_error", [(["a", "b", "c"], labels, answer, True)])

    def test_mr_gsm8k_counts_from_one(self, read):
        assert read(self.MR) == ("first_error", [(["a", "b", "c"], [1, 0, 0], 0, True)])
        first = "model_output_solution_first_error_step"
        assert read({**self.MR, first: "3"})[1][0][1] == [1, 1, 0]
        right = {**self.MR, first: "N/A", "model_output_solution_correctness": "correct"}
        assert read({**right, "model_output_answer_correctness": "correct"})[1] == [
            (["a", "b", "c"], [1, 1, 1], 1, True)
        ]
        assert read({**self.MR, "model_output_answer_correctness": "correct"})[1][0][1:3] == ([1, 0, 0], 1)
        with pytest.raises(
            UserError, match="line 1: 'model_output_solution_correctness' is 'incorrect' beside .*'N/A'"
        ):
            read({**self.MR, first: "N/A"})

    def test_prmbench_names_every_wrong_step(self, read_records):
        name, (modified, original) = read_records([self.PRM])
        assert (name, modified.prompt, original.prompt) == ("first_error", "Changed?", Q)
        assert (modified.step_labels, modified.answer_label) == ([1, 0, 1], None)
        assert (original.step_labels, original.answer_label) == ([1, 1], 1)

    @pytest.mark.parametrize(
        "row, message",
        [
            ({**PROCESSBENCH, "label": 3}, "'label' names step 4 of 3; correct it"),
            ({**PROCESSBENCH, "label": "two"}, "'label' is 'two'; give the number"),
            ({**PROCESSBENCH, "label": None}, "'label' is null"),
            ({**PRM, "error_steps": [4]}, "'error_steps' names step 4 of 3; steps are counted from 1"),
            ({**PRM, "error_steps": [0]}, "'error_steps' names step 0 of 3; steps are counted from 1"),
        ],
    )
    def test_bad_rows(self, read, row, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read(row)


def turns(*contents, name="conversations") -> dict:
    return {name: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


class TestSignTurns:
    def test_steps(self, read, read_records):
        row = turns(f"{Q} Step 1: a", "+", "Step 2: b", "-")
        assert read(row) == ("sign_turns", [(["Step 1: a", "Step 2: b"], [1, 0], 0, True)])
        assert read_records([row])[1][0].prompt == Q
        assert read(turns(f"{Q} Step 1: a", "+", name="messages"))[1] == [(["Step 1: a"], [1], 1, True)]

    def test_a_whole_answer(self, read):
        row = turns(f"{Q} Step 1: a\nStep 2: b", "-")
        assert read(row)[1] == [(["Step 1: a\nStep 2: b"], None, 0, True)]

    @pytest.mark.parametrize(
        "row, message",
        [
            (turns(f"{Q} a", "+"), "'conversations' does not say by \"Step 1\""),
            (turns(f"{Q} Step 1: a", "+", "b"), "'conversations' ends with a user message; answer it"),
        ],
    )
    def test_bad_rows(self, read, row, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read(row)


class TestStepDPO:
    ROW = {
        "dataset": "d",
        "prompt": Q,
        "initial_reason_steps": "Let's see.\nStep 1: 1+1=2\nStep 2:",
        "chosen": " 2+1=3",
        "rejected": " 2+1=4",
        "full_chosen": " 2+1=3\nStep 3: It is\n3.",
        "full_rejected": " 2+1=4",
        "answer": "3",
    }

    def test_the_next_step(self, read_records):
        name, (chosen, rejected) = read_records([self.ROW])
        assert name == "step_dpo"
        assert chosen.prompt == rejected.prompt == Q + "Let's see.\nStep 1: 1+1=2\nStep 2:"
        assert (chosen.steps, chosen.step_labels, chosen.side) == ([" 2+1=3"], [1], 1)
        assert (rejected.steps, rejected.step_labels, rejected.side) == ([" 2+1=4"], [0], 0)
        assert (chosen.answer_label, rejected.answer_label, chosen.complete, rejected.complete) == (None,) * 2 + (
            False,
        ) * 2
        assert chosen.problem_id == Q

    def test_the_pipelines_files_say_prefix(self, read_records):
        row = {"prompt": Q, "prefix": "Step 1:", "chosen": " a", "rejected": " b", "original_chosen": " a c"}
        name, (chosen, _) = read_records([row])
        assert (name, chosen.prompt, chosen.steps) == ("step_dpo", Q + "Step 1:", [" a"])
        with pytest.raises(UserError, match="line 1: no 'full_chosen'; add it, or leave out --data.whole_answers"):
            read_records([row], whole_answers=True)

    def test_a_chat_prompt_ends_with_the_beginning_of_the_answer(self, read_records):
        _, (chosen, _) = read_records([self.ROW], apply_chat_template=True)
        begun = {"role": "assistant", "content": self.ROW["initial_reason_steps"]}
        assert chosen.prompt == [{"role": "user", "content": Q}, begun]

    def test_whole_answers(self, read):
        _, (chosen, rejected) = read(self.ROW, whole_answers=True)
        start = ["Let's see.", "Step 1: 1+1=2"]
        assert chosen == ([*start, "Step 2: 2+1=3", "Step 3: It is\n3."], [1, 1, 1, 1], 1, True)
        assert rejected == ([*start, "Step 2: 2+1=4"], [1, 1, 0], 0, True)

    @pytest.mark.parametrize(
        "so_far, right",
        [("", 0), ("Step 1: a", 1), ("Step 1: a\n", 1), ("Step 1: a\nStep 2:", 1), ("\n\nStep 1: a\nStep 2: b", 2)],
    )
    def test_the_whole_text_is_what_the_columns_hold(self, read, so_far, right):
        rest = "Step 2: c" if so_far.endswith("\n") else "\nStep 2: c" if so_far.endswith(("a", "b")) else " c"
        row = {**self.ROW, "initial_reason_steps": so_far, "full_chosen": rest, "full_rejected": rest}
        _, (_, (steps, labels, _, _)) = read(row, whole_answers=True)
        assert "\n".join(steps) == so_far + rest
        assert labels == [1] * right + [0] * (len(steps) - right)

    @pytest.mark.parametrize("empty", ["", " "])
    def test_an_empty_side(self, read, empty):
        with pytest.raises(UserError, match="line 1: 'rejected' is empty; give it text or remove the row"):
            read({**self.ROW, "rejected": empty})


class TestAlphaMath:
    def test_q_may_be_text(self, read):
        row = {"instruction": Q, "output": [{"step": "a\n", "Q": "0.3"}, {"step": "b", "Q": "-1"}]}
        assert read(row) == ("alphamath", [(["a", "b"], [0, 0], 0, True)])


class TestStepwise:
    def test_rows_that_end_as_prm800k_does_make_the_others_beginnings(self, read_records):
        rows = [
            {"prompt": Q, "completions": ["a", end], "labels": [1, 1]} for end in ("the answer is 3", "# Answer\n\n3")
        ]
        assert [one.complete for one in read_records(rows)[1]] == [False, True]
        assert [one.complete for one in read_records(rows[:1])[1]] == [True]


def test_reading_leaves_the_row_as_it_was(read_records):
    row = prm800k(rated(1, texts="a", human="h"))
    before = copy.deepcopy(row)
    read_records([row])
    assert row == before
