"""From the flags of ``evaluate`` to the way in which problems are answered, and what judges the answers."""

import json
import os
import re
from dataclasses import replace
from functools import partial
from typing import cast

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.generate.config import EvaluateConfig
from pipa_openrlhf.generate.job import Answers, Decode, Job, sample
from pipa_openrlhf.generate.sampling import SamplingSettings, sample_batches
from pipa_openrlhf.generate.sandbox import Sandbox
from pipa_openrlhf.generate.search import SearchSettings, Tree, search_batches
from pipa_openrlhf.model.value_model import ValueModel, head_digest, load_fitting_head


def sampling_of(config: EvaluateConfig) -> SamplingSettings:
    """How answers are drawn; it is part of what an evaluation is."""
    flags = config.evaluate
    greedy = SamplingSettings(max_new_tokens=flags.max_new_tokens, batch_size=flags.batch_size, seed=config.train.seed)
    if flags.decode == "greedy":
        return greedy
    if flags.decode == "sample":
        return replace(greedy, num_samples=flags.num_answers, temperature=flags.temperature, top_p=flags.top_p)
    sbs = config.sbs
    return SearchSettings(
        temperature=sbs.temperature,
        top_p=sbs.top_p,
        max_new_tokens=flags.max_new_tokens,
        batch_size=flags.batch_size,
        seed=config.train.seed,
        beams=sbs.beams,
        samples=sbs.samples,
        value=sbs.value,
        max_depth=sbs.max_depth,
        step_ends=config.step_ends,
        execute_code=sbs.execute_code,
    )


def head_description(config: EvaluateConfig) -> dict:
    """Of the value head that judges answers, as JSON; empty where none does.

    Raises:
        UserError: there is none.
    """
    return {} if config.head_folder is None else {"value_head": head_digest(config.head_folder)}


def decode_of(config: EvaluateConfig) -> Decode:
    """The way in which problems are answered.

    Raises:
        UserError: code is to be run, and cannot be contained here.
    """
    folder, tree_dir = config.head_folder, config.sbs.tree_dir
    sandbox = Sandbox() if config.sbs.execute_code else None

    def search(job: Job, batches: list[list[int]]) -> Answers:
        model = job.load_model()
        head = None if folder is None else load_fitting_head(folder, model)
        on_tree = None if tree_dir is None else partial(_write_tree, tree_dir, job)
        settings = cast(SearchSettings, job.sampling)  # of sampling_of()
        return search_batches(model, job.tokenizer, job.prompts, batches, settings, head, on_tree, sandbox)

    def sample_and_judge(job: Job, batches: list[list[int]]) -> Answers:
        model = job.load_model()
        answers = sample_batches(model, job.tokenizer, job.prompts, batches, job.sampling)
        return _judged(answers, ValueModel(model, load_fitting_head(str(folder), model)), job.tokenizer, job.prompts)

    if config.evaluate.decode == "sbs":
        return search
    return sample if folder is None else sample_and_judge


def _judged(
    answered: Answers, value_model: ValueModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> Answers:
    """Answers with their values: g after the last token, the g that predicted the end."""
    for batch, answers in answered:
        ids = [one or [] for one in encode([prompts[index] for index in batch], tokenizer)]
        prefixes = [prompt + list(one.token_ids) for prompt, of_prompt in zip(ids, answers) for one in of_prompt]
        values = iter(value_model.values(prefixes))
        yield batch, [[replace(one, value=next(values)) for one in of_prompt] for of_prompt in answers]


def _write_tree(folder: str, job: Job, index: int, tree: Tree) -> None:
    problem = job.problems[index]
    os.makedirs(folder, exist_ok=True)
    content = {
        "problem_id": problem.problem_id,
        "question": problem.question,
        "gold": problem.answer,
        "prompt": job.prompts[index],
        **tree.as_json(),
    }
    with open(os.path.join(folder, f"{_as_file_name(problem.problem_id)}.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def _as_file_name(problem_id: str) -> str:
    """The same for no two problems; what is no letter, digit, dot or dash is written by its bytes."""
    return re.sub(r"[^\w.-]", lambda found: f"%{found[0].encode().hex()}", problem_id)
