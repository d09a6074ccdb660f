"""Step-level beam search: steps are sampled, partial answers ranked by a value, the best kept (AlphaMath,
arXiv 2405.03553).

The first steps are beams x samples; after that every live beam samples so many next steps. Of all candidates of a
problem the best ones stay, at first as many as beams. A beam that finishes, or fails, leaves, and its place with it.
The answer is the finished beam of highest value; where none finished there is no answer.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.generate.code_steps import CodeRunner
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings, end_tokens
from pipa_openrlhf.generate.sandbox import Sandbox
from pipa_openrlhf.generate.steps import State, Step, StepSampler, StepSettings
from pipa_openrlhf.model.policy import ValueHead

# What became of a candidate.
ROOT, KEPT, FINISHED = "root", "kept", "finished"
WORSE, DUPLICATE, TOO_LONG, TOO_DEEP = "worse", "duplicate", "too long", "too deep"


@dataclass(frozen=True)
class SearchSettings(SamplingSettings):
    """How one answer is searched; ``batch_size`` counts candidates. See ``--sbs.*``."""

    beams: int = 3
    samples: int = 1
    value: str = "head"
    max_depth: int = 10
    step_ends: tuple[str, ...] = ("\n",)
    execute_code: bool = False

    @property
    def rows_per_prompt(self) -> int:
        """Most candidates of a problem at a time."""
        return self.beams * self.samples


@dataclass
class Node:
    """A partial answer.

    Attributes:
        parent: number of the one that it continues.
        ids, text: of the answer as far as it goes.
        log_prob, num_tokens: of all that was drawn for it.
        value: what it is ranked by.
        state: to go on from; None where that is over.
    """

    parent: int | None
    depth: int
    ids: list[int]
    text: str
    log_prob: float
    num_tokens: int
    value: float
    fate: str
    state: State | None


class Tree:
    """The search of one problem.

    Args:
        root: the state after the prompt.
        text: of an answer's tokens.
        key: decides, with the seed, what is drawn.
    """

    def __init__(self, root: State, text: Callable[[list[int]], str], settings: SearchSettings, key: str):
        self._settings = settings
        self._text = text
        self._key = key
        self.nodes = [Node(None, 0, [], "", 0.0, 0, root.value, ROOT, root)]
        self.live = [0]
        self._width = settings.beams

    def wanted(self) -> list[tuple[int, np.random.Generator]]:
        """The nodes that are to be continued, each as often as it is wanted, and chance for each."""
        settings = self._settings
        times = settings.samples * (settings.beams if self.live == [0] else 1)
        parents = [parent for parent in self.live for _ in range(times)]
        depth = self.nodes[self.live[0]].depth
        return [(parent, chance_of(settings.seed, self._key, depth, at)) for at, parent in enumerate(parents)]

    def take(self, parents: list[int], steps: list[Step]) -> None:
        """Choose among the steps that continue ``parents``."""
        candidates, texts = [], set()
        for parent, step in zip(parents, steps, strict=True):
            node = self._node(parent, step)
            self.nodes.append(node)
            if (node.text, step.finished) in texts:
                node.fate, node.state = DUPLICATE, None
            else:
                texts.add((node.text, step.finished))
                candidates.append(len(self.nodes) - 1)
        candidates.sort(key=lambda number: -self.nodes[number].value)  # equal ones as they were drawn
        kept, others = candidates[: self._width], candidates[self._width :]
        for number in self.live:
            self.nodes[number].state = None
        for number in others:
            self.nodes[number].fate, self.nodes[number].state = WORSE, None
        self.live = [number for number in kept if self.nodes[number].fate == KEPT]
        self._width -= len(kept) - len(self.live)
        is_decided = self._settings.value == "none" and any(self.nodes[one].fate == FINISHED for one in kept)
        if is_decided or (self.live and self.nodes[self.live[0]].depth == self._settings.max_depth):
            self._end()

    def _node(self, parent: int, step: Step) -> Node:
        before = self.nodes[parent]
        ids = before.ids + step.ids
        log_prob, num_tokens = before.log_prob + step.log_prob, before.num_tokens + step.num_tokens
        value = {"head": step.value, "logprob": log_prob / num_tokens, "none": 0.0}[self._settings.value]
        fate = FINISHED if step.finished else TOO_LONG if step.state is None else KEPT
        return Node(parent, before.depth + 1, ids, self._text(ids), log_prob, num_tokens, value, fate, step.state)

    def _end(self) -> None:
        for number in self.live:
            node = self.nodes[number]
            node.state = None
            node.fate = TOO_DEEP if node.depth == self._settings.max_depth else KEPT
        self.live = []

    @property
    def best(self) -> int | None:
        """Number of the answer; of equal ones that which finished first."""
        finished = [number for number, node in enumerate(self.nodes) if node.fate == FINISHED]
        return max(finished, key=lambda number: self.nodes[number].value) if finished else None

    def answer(self) -> Answer:
        """The answer; an empty one, not finished, where no beam finished."""
        if self.best is None:
            return Answer("", finished=False, num_tokens=0)
        node = self.nodes[self.best]
        return Answer(node.text, finished=True, num_tokens=node.num_tokens, value=node.value)

    def as_json(self) -> dict:
        """Every candidate by number, with the text of its last step."""
        nodes = [
            {
                "parent": node.parent,
                "depth": node.depth,
                "text": node.text[len(self.nodes[node.parent or 0].text) :],
                "value": node.value,
                "log_prob": node.log_prob,
                "num_tokens": node.num_tokens,
                "fate": node.fate,
            }
            for node in self.nodes
        ]
        return {"ranked_by": self._settings.value, "answer": self.best, "nodes": nodes}


def chance_of(seed: int, key: str, depth: int, number: int) -> np.random.Generator:
    """Chance of one candidate, whatever is beside it: results do not depend on the size of batches."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return np.random.default_rng([int.from_bytes(digest[:8], "big"), depth, number])


def search_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batches: list[list[int]],
    settings: SearchSettings,
    head: ValueHead | None = None,
    on_tree: Callable[[int, Tree], None] | None = None,
    sandbox: Sandbox | None = None,
) -> Iterator[tuple[list[int], list[list[Answer]]]]:
    """Each batch's indices with the one answer to each of its prompts.

    Args:
        head: needed for the value ``head``.
        on_tree: told of each prompt's tree when its batch is done.
        sandbox: runs the code of steps; None: it is not run.

    Raises:
        UserError: the model's states cannot be gone on from.
    """
    drawn = StepSettings(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        step_ends=settings.step_ends,
        stop=settings.stop,
        ends=frozenset(end_tokens(model.generation_config, tokenizer)),
    )
    sampler = StepSampler(model, tokenizer, drawn, head)
    runner = None if sandbox is None else CodeRunner(sandbox, sampler, tokenizer)
    for batch in batches:
        trees = _search([prompts[index] for index in batch], sampler, tokenizer, settings, runner)
        if on_tree is not None:
            for index, tree in zip(batch, trees):
                on_tree(index, tree)
        yield batch, [[tree.answer()] for tree in trees]


def _search(
    prompts: list[str],
    sampler: StepSampler,
    tokenizer: PreTrainedTokenizerBase,
    settings: SearchSettings,
    runner: CodeRunner | None,
) -> list[Tree]:
    """All problems take a step at a time, together."""
    ids = [one or [] for one in encode(prompts, tokenizer)]
    trees = [
        Tree(root, partial(sampler.text, root.prompt), settings, prompt)
        for prompt, root in zip(prompts, sampler.begin(ids))
    ]
    while going := [tree for tree in trees if tree.live]:
        wanted = [tree.wanted() for tree in going]
        flat = [(tree, *one) for tree, of_tree in zip(going, wanted) for one in of_tree]
        starts = [tree.nodes[parent].state for tree, parent, _ in flat]
        drawn = sampler.draw([start for start in starts if start is not None], [one[2] for one in flat])
        steps = iter(drawn if runner is None else runner.run(drawn))
        for tree, of_tree in zip(going, wanted):
            tree.take([parent for parent, _ in of_tree], [next(steps) for _ in of_tree])
    return trees
