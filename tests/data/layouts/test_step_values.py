"""Layouts whose steps have values, of a search tree or of rollouts, compared with what the rows say by hand."""

import pytest

from pipa_openrlhf.errors import UserError

Q = "What is 1+1+1?"


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
