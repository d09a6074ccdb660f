"""Step-level beam search against a plain one: a problem at a time, every token from the whole prefix, no cache."""

import hashlib
import re

import numpy as np
import pytest
import torch
from test_sampling import PROMPTS, make_model, make_tokenizer

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.sampling import SamplingSettings, plan_batches, sample_batches
from pipa_openrlhf.generate.search import (
    DUPLICATE,
    FINISHED,
    KEPT,
    TOO_DEEP,
    TOO_LONG,
    WORSE,
    SearchSettings,
    Tree,
    search_batches,
)
from pipa_openrlhf.generate.steps import State, Step
from pipa_openrlhf.model.policy import ValueHead

# Steps of a few tokens and answers of a few steps, from a model that knows nothing.
STEP_ENDS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJK\n")
MANY_ENDS = [256, *range(40, 52)]
BASE = {"temperature": 0.9, "max_new_tokens": 24, "max_depth": 6, "step_ends": STEP_ENDS, "seed": 5}


@pytest.fixture(scope="module")
def parts():
    model = make_model()
    model.generation_config.eos_token_id = MANY_ENDS
    torch.manual_seed(1)
    head = ValueHead(32, 16, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    return model, make_tokenizer(), head


def found(parts, settings):
    """Answers by prompt, and trees."""
    model, tokenizer, head = parts
    model.generation_config.eos_token_id = MANY_ENDS  # which a search replaces by none, and sampling by its own
    answers, trees = {}, {}
    head = head if settings.value == "head" else None
    batches = plan_batches(PROMPTS, settings)
    for batch, of_batch in search_batches(model, tokenizer, PROMPTS, batches, settings, head, trees.__setitem__):
        answers.update(zip(batch, [one for (one,) in of_batch], strict=True))
    return answers, trees


class Plain:
    """The search as METHOD has it, in the plainest words, of one prompt."""

    def __init__(self, parts, prompt, settings):
        self.model, self.tokenizer, self.head = parts
        self.prompt, self.settings = prompt, settings
        self.prompt_ids = self.tokenizer(prompt).input_ids

    def chance(self, depth, number):
        digest = hashlib.sha256(f"{self.settings.seed}\0{self.prompt}".encode()).digest()
        return np.random.default_rng([int.from_bytes(digest[:8], "big"), depth, number])

    @torch.no_grad()
    def logits(self, answer):
        return self.model(torch.tensor([self.prompt_ids + answer])).logits[0, -1].double()

    @torch.no_grad()
    def value(self, answer, log_prob, num_tokens):
        if self.settings.value == "none":
            return 0.0
        if self.settings.value == "logprob":
            return log_prob / num_tokens
        hidden = self.model.model(torch.tensor([self.prompt_ids + answer])).last_hidden_state[0, -1]
        return torch.sigmoid(self.head(hidden)).item()

    def step(self, answer, log_prob, num_tokens, chance):
        """(answer, log_prob, num_tokens, what became of it) after one more step."""
        answer, text = list(answer), ""
        while True:
            logits = self.logits(answer)
            share, u = torch.softmax(logits / self.settings.temperature, -1).tolist(), chance.random()
            token = 0
            while u >= share[token]:
                u -= share[token]
                token += 1
            log_prob += torch.log_softmax(logits, -1)[token].item()
            num_tokens += 1
            if token in MANY_ENDS:
                return answer, log_prob, num_tokens, "finished"
            answer.append(token)
            if len(answer) == self.settings.max_new_tokens:
                return answer, log_prob, num_tokens, "failed"
            text += self.tokenizer.decode([token])
            if text.strip() and text[-1] in self.settings.step_ends:
                return answer, log_prob, num_tokens, "live"

    def search(self):
        live, finished, width = [([], 0.0, 0)], [], self.settings.beams
        for depth in range(self.settings.max_depth):
            times = self.settings.samples * (self.settings.beams if depth == 0 else 1)
            parents = [one for one in live for _ in range(times)]
            candidates, seen = [], set()
            for number, parent in enumerate(parents):
                *new, fate = self.step(*parent, self.chance(depth, number))
                text = self.tokenizer.decode(new[0])
                if (text, fate == "finished") not in seen:
                    seen.add((text, fate == "finished"))
                    candidates.append((self.value(*new), text, new, fate))
            best = sorted(candidates, key=lambda one: one[0], reverse=True)[:width]
            finished += [one for one in best if one[3] == "finished"]
            live = [one[2] for one in best if one[3] == "live"]
            width -= len(best) - len(live)
        return max(finished, key=lambda one: one[0])[1] if finished else None


@pytest.mark.parametrize("value", ["none", "head", "logprob"])
@pytest.mark.parametrize("beams, samples", [(1, 1), (3, 1), (2, 3)])
def test_it_finds_what_a_plain_search_finds(parts, beams, samples, value):
    settings = SearchSettings(**BASE, beams=beams, samples=samples, value=value)
    answers, _ = found(parts, settings)
    expected = [Plain(parts, prompt, settings).search() for prompt in PROMPTS]
    assert [answers[index].text if answers[index].finished else None for index in range(4)] == expected
    assert sum(one is not None for one in expected) >= 2


def test_its_answers_do_not_depend_on_what_is_beside_them(parts):
    settings = {**BASE, "beams": 2, "samples": 2}
    alone, together = (found(parts, SearchSettings(**settings, batch_size=size))[0] for size in (1, 96))
    assert {index: one.text for index, one in alone.items()} == {index: one.text for index, one in together.items()}
    assert len({one.text for one in alone.values()}) > 1
    other = found(parts, SearchSettings(**{**settings, "seed": 6}))[0]
    assert any(other[index].text != alone[index].text for index in alone)


@pytest.mark.parametrize("beams, samples", [(1, 1), (3, 2)])
def test_at_temperature_0_it_is_greedy(parts, beams, samples):
    """With more beams too: all candidates are the same one, and only one of them stays."""
    model, tokenizer, _ = parts
    settings = {**BASE, "temperature": 0.0, "max_new_tokens": 100, "max_depth": 99, "beams": beams, "samples": samples}
    answers, trees = found(parts, SearchSettings(**settings))
    model.generation_config.eos_token_id = MANY_ENDS
    greedy = SamplingSettings(max_new_tokens=100)
    for batch, of_batch in sample_batches(model, tokenizer, PROMPTS, plan_batches(PROMPTS, greedy), greedy):
        for index, (answer,) in zip(batch, of_batch):
            if answer.finished:
                assert (answers[index].text, answers[index].num_tokens) == (answer.text, answer.num_tokens)
            else:
                assert not answers[index].finished
    assert sum(one.finished for one in answers.values()) >= 2
    fates = [node.fate for node in trees[0].nodes if node.depth == 1]
    assert fates.count(DUPLICATE) == beams * samples - 1 and trees[0].nodes[1].fate != DUPLICATE


def test_an_answer_ends_before_another_problem(parts):
    settings = {**BASE, "temperature": 0.0, "max_new_tokens": 100, "max_depth": 99, "beams": 1, "value": "none"}
    whole = found(parts, SearchSettings(**settings))[0][1]
    text = whole.text
    at = next(at for at in range(8, len(text)) if text[at : at + 2].isascii() and text.index(text[at : at + 2]) == at)
    cut = found(parts, SearchSettings(**settings, stop=text[at : at + 2]))[0][1]
    assert cut.finished and cut.text == text[:at] and cut.num_tokens < whole.num_tokens


# ------------------------------------------------------------------------------ one tree, with steps made by hand


def make_tree(**settings) -> Tree:
    return Tree(make_state(), lambda ids: "".join(map(chr, ids)), SearchSettings(**settings), "key")


def make_state() -> State:
    return State([1], [], [], torch.zeros(1), 0.5)


def step(letter: str, value: float, finished=False, too_long=False) -> Step:
    over = finished or too_long
    return Step([ord(letter)], -1.0, 1, value, finished, None if over else make_state())


def take(tree: Tree, *steps: Step) -> list[str]:
    """The texts of what lives after ``steps``."""
    parents = [parent for parent, _ in tree.wanted()]
    tree.take(parents, list(steps))
    return [tree.nodes[number].text for number in tree.live]


def test_a_beam_that_finishes_or_fails_leaves_and_takes_its_place_with_it():
    tree = make_tree(beams=3, samples=2)
    assert len(tree.wanted()) == 6
    first = [
        step("a", 0.1),
        step("b", 0.9),
        step("c", 0.5),
        step("d", 0.8, finished=True),
        step("e", 0.4),
        step("f", 0),
    ]
    assert take(tree, *first) == ["b", "c"]
    assert len(tree.wanted()) == 4
    # Two places are left; the one that is as long as it may be takes one, though another was as good as a beam.
    second = [step("a", 0.3), step("b", 0.6, too_long=True), step("c", 0.5), step("d", 0.2)]
    assert take(tree, *second) == ["cc"]
    assert take(tree, step("x", 0.7, finished=True), step("y", 0.75)) == ["ccy"]
    assert take(tree, step("z", 0.1), step("z", 0.2)) == ["ccyz"]
    assert take(tree, step("!", 0.85, finished=True), step("?", 0.9, finished=True)) == []
    assert tree.answer().text == "ccyz?" and tree.answer().value == 0.9
    assert tree.answer().num_tokens == 5
    fates = {node.text: node.fate for node in tree.nodes[1:]}
    assert fates["d"] == FINISHED and fates["bb"] == TOO_LONG and fates["a"] == fates["ccx"] == WORSE
    assert fates["b"] == KEPT


def test_the_answer_is_the_finished_beam_of_highest_value_though_it_came_earlier():
    tree = make_tree(beams=2, samples=1)
    take(tree, step("a", 0.8, finished=True), step("b", 0.3))
    take(tree, step("c", 0.6, finished=True))
    assert tree.answer().text == "a"


def test_without_a_value_the_first_beam_that_finishes_ends_the_search():
    tree = make_tree(beams=3, samples=1, value="none")
    assert take(tree, step("a", 0.1), step("b", 0.9), step("c", 0.5)) == ["a", "b", "c"]
    assert take(tree, step("d", 0.1), step("e", 0, finished=True), step("f", 1, finished=True)) == []
    assert tree.answer().text == "be"


def test_a_beam_that_is_too_deep_fails():
    tree = make_tree(beams=2, samples=1, max_depth=2)
    take(tree, step("a", 0.8), step("b", 0.3))
    assert take(tree, step("c", 0.6), step("d", 0.7)) == []
    assert {node.fate for node in tree.nodes[3:]} == {TOO_DEEP}
    assert tree.best is None and tree.answer() == type(tree.answer())("", finished=False, num_tokens=0)


def test_the_same_text_from_two_beams_is_one_candidate():
    tree = make_tree(beams=2, samples=2)
    assert take(tree, step("a", 0.8), step("a", 0.8), step("b", 0.3), step("a", 0.8)) == ["a", "b"]
    assert [node.fate for node in tree.nodes[1:]] == [KEPT, DUPLICATE, KEPT, DUPLICATE]
    # The same letters and no end is another answer.
    assert take(tree, step("c", 0.1), step("c", 0.9, finished=True), step("d", 0.2), step("d", 0.2)) == ["bd"]


def test_log_prob_is_a_mean_over_the_whole_answer():
    tree = make_tree(beams=2, samples=1, value="logprob")
    long = Step([97, 97, 97], -3.0, 3, 0.0, False, make_state())
    take(tree, long, Step([98], -0.5, 1, 0.0, False, make_state()))
    assert [node.value for node in tree.nodes[1:]] == [-1.0, -0.5]
    take(tree, Step([99], -0.1, 1, 0.0, True, None), step("d", 0))  # the best is continued first
    assert [node.value for node in tree.nodes[3:]] == [pytest.approx(-0.3), pytest.approx(-1.0)]


def test_the_tree_as_json():
    tree = make_tree(beams=2, samples=1)
    take(tree, step("a", 0.8), step("b", 0.3))
    take(tree, step("c", 0.6, finished=True), step("d", 0.7))
    content = tree.as_json()
    assert (content["answer"], content["ranked_by"]) == (3, "head")
    assert [(node["parent"], node["text"], node["fate"]) for node in content["nodes"]] == [
        (None, "", "root"),
        (0, "a", KEPT),
        (0, "b", KEPT),
        (1, "c", FINISHED),
        (2, "d", KEPT),
    ]


def test_a_model_that_keeps_a_state_of_another_kind_is_refused(parts):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match=re.escape("--evaluate.decode sbs goes on from keys and values")):
        next(search_batches(model, make_tokenizer(), PROMPTS, [[0]], SearchSettings(value="none")))
