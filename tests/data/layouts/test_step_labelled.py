"""Layouts of step-labelled answers, compared with what the rows say by hand and with samples of public files."""

import copy
import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts import LAYOUTS
from pipa_openrlhf.errors import UserError

SAMPLES = Path(__file__).parents[3].parent / "shared" / "data" / "layouts"

Q = "What is 1+1+1?"


@pytest.fixture
def read(read_records):
    """Layout and what training sees of each record: steps, step labels, answer label, whether it ends."""

    def read(row: dict, **flags):
        name, records = read_records([row], **flags)
        return name, [(one.steps, one.step_labels, one.answer_label, one.complete) for one in records]

    return read


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

    def test_tables_make_floats_of_numbers_beside_nulls(self, read):
        row = prm800k(rated(1, -1, texts="ab", chosen=0.0), rated(1, texts=["# Answer\n\n3"], chosen=0.0))
        assert read(row)[1] == [(["b"], [0], None, False), (["a", "# Answer\n\n3"], [1, 1], 1, True)]

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
            (rated(1, 1, chosen=True), "'label.steps\\[0\\].chosen_completion' is True, of 2 completions; give its"),
            (rated(1, chosen=0.5), "'label.steps\\[0\\].chosen_completion' is 0.5, of 1 completions; give its"),
            (rated(1, chosen=3), "'label.steps\\[0\\].chosen_completion' is 3, of 1 completions; give its"),
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

    def test_prm800k_in_this_form_has_ratings(self, read):
        row = {"question": Q, "answer": "a ки\nb ки\n# Answer\n\n3 ки", "result": "3", "phase": "phase2"}
        row |= {"raw_labels": [1, 0, 1], "labels": ["+", "-", "+"]}
        steps = ["a", "b", "# Answer\n\n3"]
        assert read(row) == ("tagged", [(steps, [1, None, 1], 1, True)])
        assert read(row, neutral_step="negative")[1] == [(steps, [1, 0, 1], 1, True)]
        begun = {**row, "answer": "a ки\nb ки", "raw_labels": [1, -1], "labels": ["+", "-"]}
        assert read(begun)[1] == [(["a", "b"], [1, 0], None, False)]
        with pytest.raises(UserError, match="line 1: 'raw_labels\\[1\\]' is 2; a rating is -1, 0, 1 or null"):
            read({**begun, "raw_labels": [1, 2]})
        with pytest.raises(UserError, match="line 1: 1 'raw_labels' for 2 steps; give one label a step"):
            read({**begun, "raw_labels": [1]})

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

    def test_students_are_wrong_from_the_index_on(self, read):
        row = {"problem": Q, "student_incorrect_solution": ["a", "b", " 4"], "incorrect_index": 1}
        row |= {"student_correct_response": "It is 3.", "dialog_history": [{"text": "x", "user": "Teacher"}]}
        assert read(row) == ("first_error", [(["a", "b", "4"], [1, 0, 0], 0, True)])
        assert read(row, after_first_error="mask")[1] == [(["a", "b", "4"], [1, 0, None], 0, True)]
        with pytest.raises(UserError, match="line 1: 'incorrect_index' names step 4 of 3; correct it or remove"):
            read({**row, "incorrect_index": 3})

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


class TestChamp:
    TEXT = "Take 1+1.\nIt is 3. So 3+1\n\nis 4."
    WRONG = {"text": TEXT, "start_idx": 10, "end_idx": 18, "author": "m"}
    RIGHT = {"text": "It\nis 3.", "start_idx": None, "end_idx": None, "author": "m"}

    def row(self, *solutions, question=Q) -> dict:
        annotations = {str(number): one for number, one in enumerate(solutions)}
        return {"_raw_text": f"@@{question}@@", "_text": question, "fws_annotations": annotations}

    def test_the_marked_step_is_the_first_wrong_one(self, read):
        steps = ["Take 1+1.", "It is 3.", "So 3+1\n\nis 4."]
        assert read(self.row(self.WRONG)) == ("champ", [(steps, [1, 0, 0], None, True)])
        assert read(self.row(self.WRONG), after_first_error="mask")[1] == [(steps, [1, 0, None], None, True)]
        assert read(self.row(self.RIGHT))[1] == [(["It\nis 3."], [1], 1, True)]

    @pytest.mark.parametrize(
        "start, end, steps, labels",
        [
            (0, 9, ["Take 1+1.", "It is 3. So 3+1\n\nis 4."], [0, 0]),
            (19, 32, ["Take 1+1.\nIt is 3.", "So 3+1\n\nis 4."], [1, 0]),
            (19, 25, ["Take 1+1.\nIt is 3.", "So 3+1", "\nis 4."], [1, 0, 0]),
            (27, 32, ["Take 1+1.\nIt is 3. So 3+1\n", "is 4."], [1, 0]),
            (0, 32, [TEXT], [0]),
        ],
    )
    def test_where_the_text_is_cut(self, read, start, end, steps, labels):
        row = self.row({**self.WRONG, "start_idx": float(start), "end_idx": end})
        assert read(row)[1] == [(steps, labels, None, True)]

    def test_the_published_file_is_one_object(self, read_records):
        problems = {"P_1": self.row(self.WRONG, self.RIGHT), "P_2": self.row(self.RIGHT, question="R")}
        name, records = read_records([{"problems": problems, "concepts": {}, "hints": {}}])
        assert (name, [one.prompt for one in records]) == ("champ", [Q, Q, "R"])
        assert [one.answer_label for one in records] == [None, 1, 1]

    @pytest.mark.parametrize("start, end", [(5, None), (5, 5), (10, 99), (-1, 5), (True, 5), (9, 10)])
    def test_bad_marks(self, read, start, end):
        row = {"problems": {"P_1": self.row({**self.WRONG, "start_idx": start, "end_idx": end})}}
        message = "line 1: 'problems.P_1.fws_annotations.0' marks no step by .*; give the characters"
        with pytest.raises(UserError, match=message):
            read(row)


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


class TestTree:
    EXPECTED = [
        (["1+1=2", "\\boxed{3}"], [1, 1], 1, True),
        (["1+1=2", "Hm"], [1, 0], None, False),
        (["So \\boxed{4}"], [0], 0, True),
    ]

    @pytest.mark.parametrize("cumulative", [True, False])
    def test_a_tree(self, read, cumulative):
        before = [Q + "\n\n", Q + "\n\n1+1=2\n\n"] if cumulative else ["", ""]
        leaves = [
            {"text": before[1] + "\\boxed{3}", "mc_value": 1.0, "children": []},
            {"text": before[1] + "Hm", "mc_value": 0.25, "children": None},
        ]
        children = [
            {"text": before[0] + "1+1=2", "mc_value": 0.5, "children": leaves},
            {"text": before[0] + "So \\boxed{4}", "mc_value": 0, "children": []},
        ]
        row = {"question": Q, "reasoning_steps": {"text": Q, "mc_value": 0.5, "children": children}}
        assert read(row) == ("mc_tree", self.EXPECTED)

    def test_a_list(self, read, read_records):
        texts = {"": 0.5, "\n\n1+1=2": 0.5, "\n\nSo \\boxed{4}": 0.0}
        texts |= {"\n\n1+1=2\n\n\\boxed{3}": 1.0, "\n\n1+1=2\n\nHm": 0.25}
        nodes = [{"solution_prefix": Q + text, "mc_value": value} for text, value in texts.items()]
        name, records = read({"question": Q, "final_answer": "3", "reasoning_steps": nodes})
        assert (name, sorted(records, key=str)) == ("mc_tree", sorted(self.EXPECTED, key=str))
        assert read_records([{"question": Q, "reasoning_steps": nodes}])[1][0].prompt == Q

    def test_an_answer_that_was_gone_on_from_is_a_beginning(self, read):
        nodes = [{"solution_prefix": f"{Q}\n\n\\boxed{{3}}", "mc_value": 0.75}]
        assert read({"question": Q, "reasoning_steps": nodes})[1] == [(["\\boxed{3}"], [1], None, False)]

    def test_a_beginning_found_twice_has_its_mean_value(self, read):
        nodes = [{"solution_prefix": f"{Q}\n\na", "mc_value": value} for value in (0.75, 0.25, 0.25)]
        nodes.append({"solution_prefix": f"{Q}\n\na\n\nb", "mc_value": 0.5})
        assert read({"question": Q, "reasoning_steps": nodes})[1] == [(["a", "b"], [0, 1], None, False)]

    def test_a_text_that_goes_on_within_a_word_is_no_step(self, read):
        nodes = [{"solution_prefix": f"{Q}\n\nIt is {n}", "mc_value": 0.75} for n in (4, 42)]
        expected = [(["It is 4"], [1], None, False), (["It is 42"], [1], None, False)]
        assert read({"question": Q, "reasoning_steps": nodes})[1] == expected

    def test_bad_rows(self, read):
        with pytest.raises(UserError, match="line 1: 'reasoning_steps\\[0\\].mc_value' is 7; give the share"):
            read({"question": Q, "reasoning_steps": [{"solution_prefix": Q, "mc_value": 7}]})
        with pytest.raises(
            UserError, match="line 1: 'reasoning_steps\\[0\\].solution_prefix' does not begin with the q"
        ):
            read({"question": Q, "reasoning_steps": [{"solution_prefix": "a", "mc_value": 1}]})


class TestRollouts:
    ANSWERS = [
        {"steps": ["a", "b"], "step_labels": [1, 0], "step_values": [0.9, 0.8], "is_correct": True},
        {"steps": ["c"], "step_labels": None, "step_values": [0.25], "is_correct": None},
    ]

    def test_columns_of_lists(self, read):
        row = {"problem": Q, "response": ["a\nb", "c"], "steps": [["a", "b"], ["c"]], "is_correct": [True, False]}
        row |= {"step_labels": [[[True, False], [True, True]], [[False]]], "step_values": [[0.25, 1.0], [0.0]]}
        assert read(row) == ("rollouts", [(["a", "b"], [0, 1], 1, True), (["c"], [0], 0, True)])
        assert read({**row, "step_labels": [[1, 0], [1]]})[1][0] == (["a", "b"], [1, 0], 1, True)
        with pytest.raises(UserError, match="line 1: 1 'answers\\[0\\].step_values' for 2 steps"):
            read({**row, "step_values": [[0.25], [0.0]]})

    def test_labels_go_before_values(self, read):
        name, records = read({"problem": Q, "responses": self.ANSWERS})
        assert name == "rollouts"
        assert records == [(["a", "b"], [1, 0], 1, True), (["c"], [0], 0, True)]

    def test_bad_rows(self, read):
        answers = [{**self.ANSWERS[0], "step_labels": [1]}]
        with pytest.raises(UserError, match="line 1: 1 'responses\\[0\\].step_labels' for 2 steps"):
            read({"problem": Q, "responses": answers})
        answers = [{**self.ANSWERS[0], "step_labels": None, "step_values": None}]
        with pytest.raises(UserError, match="line 1: the steps of 'responses\\[0\\]' have no labels; give"):
            read({"problem": Q, "responses": answers})


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


READ_RIGHT = [
    ("prm800k_openr_sample.jsonl", "prm800k", {"neutral_step": "positive"}),
    ("math_shepherd_openr_sample.jsonl", "math_shepherd", {}),
    ("trl_math_shepherd_converted.jsonl", "math_shepherd", {}),
    ("ProcessBench/gsm8k.json", "processbench", {}),
    ("rlhflow_prm.jsonl", "rlhflow_prm", {}),
    ("openrlhf_math_shepherd_value.jsonl", "rlhflow_prm", {}),
    ("openrlhf_prm_soft.jsonl", "rlhflow_prm", {}),
    ("step_dpo.jsonl", "step_dpo", {}),
    ("step_dpo_pipeline_output.json", "step_dpo", {}),
]


@pytest.mark.parametrize("file, right, flags", READ_RIGHT)
def test_samples_are_read_right(read_records, sample_rows, file, right, flags):
    _, records = read_records(sample_rows(file), **flags)
    keys = ("prompt", "steps", "step_labels", "answer_label", "complete", "problem_id")
    expected = [{key: row[key] for key in keys} for row in sample_rows(f"right_reading/{right}.jsonl")]
    assert [{key: getattr(one, key) for key in keys} for one in records] == expected


def test_trls_conversion_of_prm800k_is_read_like_the_original(read_records, sample_rows):
    """It takes neutral steps for wrong ones."""
    name, converted = read_records(sample_rows("trl_prm800k_converted.jsonl"))
    assert name == "stepwise"
    _, original = read_records(sample_rows("prm800k_openr_sample.jsonl"), neutral_step="negative")
    for one, other in zip(converted, original, strict=True):
        assert replace(one, where=other.where) == other


@pytest.mark.parametrize(
    "file, layout, count",
    [
        ("prm800k_stepwise_jubba.jsonl", "rated_steps", 2),
        ("openr_prm_process.json", "tagged", 3),
        ("rlhflow_orm.jsonl", "sign_turns", 2),
        ("math_aps_openr_sample.jsonl", "mc_tree", None),
        ("math_aps_tree_openr_sample.jsonl", "mc_tree", None),
        ("alphamath_list.json", "alphamath", None),
        ("alphamath_json_string.json", "alphamath", None),
        ("alphamath_q_string.json", "alphamath", None),
        ("alphamath_trailing_newline.json", "alphamath", None),
        ("axolotl_stepwise.jsonl", "stepwise", None),
        ("trl_stepwise.jsonl", "stepwise", None),
        ("trl_stepwise_float.jsonl", "stepwise", None),
    ],
)
def test_samples_are_recognised(read_records, sample_rows, file, layout, count):
    name, records = read_records(sample_rows(file))
    assert name == layout
    assert count is None or len(records) == count


@pytest.mark.parametrize(
    "file, message",
    [
        ("step_dpo_one_empty_rejected.jsonl", "line 3: 'rejected' is empty"),
        ("alphamath_empty_step.json", "line 2: 'output\\[1\\].step' is empty"),
    ],
)
def test_samples_are_refused(read_records, sample_rows, file, message):
    with pytest.raises(UserError, match=message):
        read_records(sample_rows(file))


def test_no_row_of_these_fits_another_layout():
    for name in ("prm800k", "rated_steps", "tagged", "first_error", "sign_turns", "mc_tree", "rollouts", "step_dpo"):
        row = importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").EXAMPLE
        assert _fitting(row) == [name]


def test_no_sample_fits_two_layouts(sample_rows):
    sample_rows("step_dpo.jsonl")  # skips where there are none
    for path in [*SAMPLES.glob("*.json*"), *SAMPLES.glob("ProcessBench/*.json")]:
        for row in sample_rows(str(path.relative_to(SAMPLES))):
            assert len(_fitting(row)) <= 1, path.name


def _fitting(row: dict) -> list[str]:
    flags = DataConfig()
    return [name for name in LAYOUTS if importlib.import_module(f"pipa_openrlhf.data.layouts.{name}").fits(row, flags)]


def test_reading_leaves_the_row_as_it_was(read_records):
    row = prm800k(rated(1, texts="a", human="h"))
    before = copy.deepcopy(row)
    read_records([row])
    assert row == before
