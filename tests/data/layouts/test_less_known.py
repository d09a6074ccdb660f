"""Layouts of single public data sets: student solutions, resampled solutions, summaries, conversions of PRM800K."""

import json

import pytest

from pipa_openrlhf.errors import UserError

Q = "What is 1+1+1?"


@pytest.fixture
def read(read_records):
    """Layout and of each record: steps, step labels, answer label, whether it ends."""

    def read(*rows: dict, **flags):
        name, records = read_records(list(rows), **flags)
        return name, [(one.steps, one.step_labels, one.answer_label, one.complete) for one in records]

    return read


class TestStudentSolutions:
    ROW = {
        "problem": Q,
        "topic": "Sums",
        "reference_solution": "1+1=2\n2+1=3\n 3",
        "student_incorrect_solution": ["1+1=2", "2+1=4 ", " 4"],
        "incorrect_index": 1,
        "incorrect_step": "2+1=4 ",
        "dialog_history": [{"text": "How?", "user": "Teacher"}],
        "student_correct_response": "3",
    }

    def test_the_index_is_that_of_the_first_wrong_step(self, read):
        steps = ["1+1=2", "2+1=4", "4"]
        assert read(self.ROW) == ("first_error", [(steps, [1, 0, 0], 0, True)])
        assert read(self.ROW, after_first_error="mask")[1] == [(steps, [1, 0, None], 0, True)]

    def test_the_problem_is_the_prompt(self, read_records):
        assert read_records([self.ROW])[1][0].prompt == Q

    def test_an_index_outside(self, read):
        with pytest.raises(UserError, match="^data.jsonl line 1: 'incorrect_index' names step 4 of 3; correct it"):
            read({**self.ROW, "incorrect_index": 3})


class TestSummaries:
    ROW = {
        "info": {"id": "t3_x", "post": "I counted to three.", "title": "Counting", "article": None},
        "summaries": [{"text": " Two.", "policy": "a"}, {"text": " Three.", "policy": "b"}],
        "choice": 1,
        "worker": "w",
        "extra": {"confidence": 3},
    }

    def test_the_chosen_one_is_better(self, read_records):
        name, records = read_records([self.ROW])
        assert name == "summaries"
        assert [(one.prompt, one.steps, one.side, one.pair_id) for one in records] == [
            ("I counted to three.", [" Three."], 1, 0),
            ("I counted to three.", [" Two."], 0, 0),
        ]
        assert read_records([{**self.ROW, "choice": 0}])[1][0].steps == [" Two."]

    def test_an_article_instead_of_a_post(self, read_records):
        row = {**self.ROW, "info": {"id": "x", "post": None, "article": "One, two, three."}}
        assert read_records([row], apply_chat_template=True)[1][0].prompt == [
            {"role": "user", "content": "One, two, three."}
        ]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"choice": 2}, "'choice' is 2; give 0 or 1, the number of the better summary"),
            ({"choice": True}, "'choice' is True; give 0 or 1"),
            ({"summaries": [{"text": "a"}]}, "'summaries' is \\[{'text': 'a'}\\]; give a list of two objects"),
            ({"info": {"id": "x"}}, "'info.post' must be text, it is null"),
        ],
    )
    def test_bad_rows(self, read, change, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read({**self.ROW, **change})


class TestResampled:
    ASKED = f"Solve it. Problem: {Q} Solution: \n"
    BASE = {
        "prompt": ASKED + "<think>\n",
        "solution": "2+1=3 </think> \\boxed{3}",
        "full_cot": ASKED + "<think>\n2+1=3 </think> \\boxed{3}",
        "answer": "3",
        "is_correct": True,
    }
    ROLLOUT = {
        "chunk_removed": "2+1=3",
        "prefix_without_chunk": "1+1=2",
        "chunk_resampled": " 2+1=4",
        "rollout": " 2+1=4 \\boxed{4}",
        "full_cot": ASKED + "<think>\n1+1=2 2+1=4 \\boxed{4}",
        "answer": "4",
        "is_correct": False,
    }
    CUT = {**ROLLOUT, "rollout": " 2+1", "full_cot": ASKED + "<think>\n1+1=2 2+1", "answer": ""}
    FAILED = {"chunk_removed": "2+1=3", "prefix_without_chunk": "1+1=2", "error": "no answer in time"}

    def test_what_is_before_the_rollout_is_the_prompt(self, read_records):
        name, records = read_records([self.BASE, self.ROLLOUT])
        assert name == "resampled"
        assert [(one.prompt, one.steps, one.answer_label, one.step_labels, one.complete) for one in records] == [
            (self.ASKED + "<think>\n", ["2+1=3 </think> \\boxed{3}"], 1, None, True),
            (self.ASKED + "<think>\n1+1=2", [" 2+1=4 \\boxed{4}"], 0, None, True),
        ]
        assert {one.problem_id for one in records} == {self.ASKED}

    def test_thoughts_are_the_assistants(self, read_records):
        _, [record] = read_records([self.ROLLOUT], apply_chat_template=True)
        assert record.prompt == [
            {"role": "user", "content": self.ASKED},
            {"role": "assistant", "content": "<think>\n1+1=2"},
        ]

    def test_an_answer_that_was_cut_off_does_not_end_and_a_failure_is_no_answer(self, read):
        assert read(self.ROLLOUT, self.CUT, self.FAILED)[1] == [
            ([" 2+1=4 \\boxed{4}"], None, 0, True),
            ([" 2+1"], None, 0, False),
        ]

    def test_the_table_holds_the_files(self, read):
        def file(name: str, content: object) -> dict:
            return {"path": f"m/problem_1/{name}", "filename": name, "content": json.dumps(content)}

        rows = [
            file("chunk_0/solutions.json", [self.ROLLOUT, self.FAILED]),
            file("chunks.json", {"chunks": ["1+1=2"]}),
            file("base_solution.json", self.BASE),
        ]
        assert read(*rows) == (
            "resampled",
            [([" 2+1=4 \\boxed{4}"], None, 0, True), (["2+1=3 </think> \\boxed{3}"], None, 1, True)],
        )

    @pytest.mark.parametrize(
        "row, message",
        [
            ({**ROLLOUT, "full_cot": "x"}, "'full_cot' does not end with 'rollout'; correct it or remove the row"),
            ({"path": "solutions.json", "content": "["}, "'content' is not valid JSON \\(Expecting value"),
            (
                {"path": "solutions.json", "content": json.dumps([CUT | {"rollout": ""}])},
                "'content\\[0\\].rollout' is",
            ),
        ],
    )
    def test_bad_rows(self, read, row, message):
        with pytest.raises(UserError, match=f"^data.jsonl line 1: {message}"):
            read(row)


class TestConversionsOfPRM800K:
    ENDED = {"problem": Q, "steps": [{"step": "2+1=3", "rating": 0}, {"step": "So.\n\n# Answer\n\n3", "rating": 1}]}
    BEGUN = {"problem": Q, "steps": [{"step": "2+1=3", "rating": 1}, {"step": "So 4", "rating": -1}]}

    def test_where_some_answers_end_others_are_beginnings(self, read):
        ended = (["2+1=3", "So.\n\n# Answer\n\n3"], [None, 1], 1, True)
        assert read(self.ENDED, self.BEGUN) == ("rated_steps", [ended, (["2+1=3", "So 4"], [1, 0], None, False)])
        assert read(self.ENDED, self.BEGUN, prefixes="false")[1][1] == (["2+1=3", "So 4"], [1, 0], 0, True)
        assert read(self.BEGUN)[1] == [(["2+1=3", "So 4"], [1, 0], 0, True)]

    def test_an_answer_label_of_a_beginning_is_kept(self, read):
        begun = {**self.BEGUN, "answer_label": True}
        assert read(self.ENDED, begun)[1][1] == (["2+1=3", "So 4"], [1, 0], 1, False)

    REFINED = {
        "question": Q,
        "answer": "1+1=2 ки\n2+1=3 ки\nSo.\n\n# Answer\n\n3 ки",
        "raw_labels": [1, 0, 1],
        "labels": ["+", "-", "+"],
        "result": "3",
        "phase": "phase1",
    }

    @pytest.mark.parametrize("neutral, label", [("mask", None), ("positive", 1), ("negative", 0)])
    def test_raw_labels_know_the_neutral_steps(self, read, neutral, label):
        with_minus = {**self.REFINED, "answer": "1+1=2 ки\n2+1=4 ки\nSo ки", "raw_labels": [0, 1, -1]}
        assert read(self.REFINED, with_minus, neutral_step=neutral) == (
            "tagged",
            [
                (["1+1=2", "2+1=3", "So.\n\n# Answer\n\n3"], [1, label, 1], 1, True),
                (["1+1=2", "2+1=4", "So"], [label, 1, 0], None, False),
            ],
        )

    def test_one_rating_a_step(self, read):
        with pytest.raises(UserError, match="^data.jsonl line 1: 2 'raw_labels' for 3 steps; give one label a step"):
            read({**self.REFINED, "raw_labels": [1, 0]})
        with pytest.raises(
            UserError, match="^data.jsonl line 1: 'raw_labels\\[1\\]' is 2; a rating is -1, 0, 1 or null"
        ):
            read({**self.REFINED, "raw_labels": [1, 2, 1]})


class TestFunctionCalls:
    CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}
    TURNS = [{"from": "human", "value": Q}, CALL, {"from": "observation", "value": "3"}]
    AS_CALL = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}],
    }

    def test_a_call_in_the_prompt(self, read_records):
        row = {
            "conversations": self.TURNS,
            "chosen": {"from": "gpt", "value": "3"},
            "rejected": {"from": "gpt", "value": "4"},
        }
        _, [chosen, _] = read_records([row], apply_chat_template=True)
        assert chosen.prompt == [
            {"role": "user", "content": Q},
            self.AS_CALL,
            {"role": "tool", "content": "3"},
        ]

    def test_a_call_as_the_answer(self, read_records):
        row = {"conversations": self.TURNS[:1], "chosen": self.CALL, "rejected": {"from": "gpt", "value": "4"}}
        _, [chosen, rejected] = read_records([row], apply_chat_template=True)
        assert (chosen.messages, rejected.steps) == ([self.AS_CALL], ["4"])

    def test_several_calls(self, read_records):
        calls = [{"name": "add", "arguments": {}}, {"name": "mul", "arguments": {}}]
        several = {"from": "function_call", "value": json.dumps(calls)}
        row = {"conversations": [*self.TURNS[:1], several], "label": True}
        _, [record] = read_records([row], apply_chat_template=True)
        assert [one["function"]["name"] for one in record.messages[0]["tool_calls"]] == ["add", "mul"]

    @pytest.mark.parametrize("value", ["add(1)", '{"arguments": {}}', "[]", "3"])
    def test_what_is_no_call(self, read_records, value):
        row = {"conversations": [*self.TURNS[:1], {"from": "function_call", "value": value}], "label": True}
        with pytest.raises(
            UserError, match="'conversations\\[1\\]' is no function call, it is .*; give a JSON object"
        ):
            read_records([row], apply_chat_template=True)


def test_completions_beside_correctness_are_whole_answers(read):
    row = {"prompt": Q, "completions": ["2+1=3", "4"], "correctness": [True, False], "steps": [["2+1=3"], ["4"]]}
    assert read(row) == ("answers", [(["2+1=3"], None, 1, True), (["4"], None, 0, True)])
