"""A model, a file of problems, and how to answer them: what `sample` and `evaluate` share."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.cli.args import default_prior_cache_dir
from pipa_openrlhf.cli.checks import check_model_path
from pipa_openrlhf.data.chat_template import use_chat_template
from pipa_openrlhf.distributed.devices import device, dtype_of, slow_dtype_hint
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generation.problem_file import Problem, read_problems
from pipa_openrlhf.generation.prompts import prompt_text
from pipa_openrlhf.generation.row_file import RowFile
from pipa_openrlhf.generation.sampling import Answer, SamplingSettings, plan_batches, sample_batches
from pipa_openrlhf.models.identity import weights_id
from pipa_openrlhf.models.loading import (
    load_causal_lm,
    load_tokenizer,
    resolve_attention,
    use_modelscope,
)

_AT_LEAST_ONE = ("problems.max", "sample.num_answers", "sample.max_new_tokens", "sample.batch_size")
_AT_LEAST_ONE += ("evaluate.max_new_tokens", "evaluate.batch_size")


@dataclass(frozen=True)
class Job:
    args: SimpleNamespace
    problems: list[Problem]
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingSettings

    def description(self) -> dict:
        """Everything the answers depend on, as JSON."""
        args = self.args
        with open(args.problems.file, "rb") as file:
            problems_sha256 = hashlib.sha256(file.read()).hexdigest()
        return {
            "model": args.model.model_name_or_path,
            "weights": weights_id(args.model.model_name_or_path, default_prior_cache_dir()),
            "dtype": args.ds.param_dtype,
            "problems": args.problems.file,
            "problems_sha256": problems_sha256,
            "num_problems": len(self.problems),
            "first_prompt": self.prompts[0],
            **asdict(self.sampling),
        }

    def load_model(self) -> PreTrainedModel:
        args = self.args
        if hint := slow_dtype_hint(args.ds.param_dtype):
            print(hint)
        model = load_causal_lm(
            args.model.model_name_or_path,
            dtype_of(args.ds.param_dtype),
            resolve_attention(args.ds.attn_implementation, args.ds.param_dtype),
            trust_remote_code=args.model.trust_remote_code,
            experts_implementation=args.ds.experts_implementation,
        )
        return model.to(device())


def prepare_job(args: SimpleNamespace, sampling: SamplingSettings) -> Job:
    """Read everything but the model's weights, so that most mistakes show within seconds.

    Raises:
        UserError: a flag is missing or wrong, or the problem file cannot be read.
    """
    _check_flags(args)
    if args.use_ms:
        use_modelscope()
    problems = read_problems(args.problems.file, args.problems.max)
    tokenizer = load_tokenizer(
        args.model.model_name_or_path,
        use_fast=not args.data.disable_fast_tokenizer,
        trust_remote_code=args.model.trust_remote_code,
        padding_side="left",
    )
    if args.data.apply_chat_template:
        use_chat_template(tokenizer, args.data.tokenizer_chat_template)
    prompts = [
        prompt_text(problem.question, tokenizer, args.data.input_template, args.data.apply_chat_template)
        for problem in problems
    ]
    return Job(args, problems, prompts, tokenizer, sampling)


def run_job(job: Job, file: RowFile, make_row: Callable[[Problem, Answer], dict], title: str) -> None:
    """Answer every problem that ``file`` lacks; its rows get ``problem_id`` and ``sample`` (0 to K - 1) first."""
    done = {(row["problem_id"], row["sample"]) for row in file.rows}
    samples = range(job.sampling.num_samples)
    batches = [
        batch
        for batch in plan_batches(job.prompts, job.sampling)
        if any((job.problems[index].problem_id, sample) not in done for index in batch for sample in samples)
    ]
    if not batches:
        return
    model = job.load_model()
    total = len(job.problems) * len(samples)
    with tqdm(total=total, initial=len(done), desc=title, unit="answer", dynamic_ncols=True) as bar:
        for batch, answers in sample_batches(model, job.tokenizer, job.prompts, batches, job.sampling):
            rows = []
            for index, answers_of_problem in zip(batch, answers):
                problem = job.problems[index]
                for sample, answer in enumerate(answers_of_problem):
                    if (problem.problem_id, sample) not in done:
                        key = {"problem_id": problem.problem_id, "sample": sample}
                        rows.append(key | make_row(problem, answer))
            file.append(rows)
            bar.update(len(rows))


def _check_flags(args: SimpleNamespace) -> None:
    for name in ("model.model_name_or_path", "problems.file"):
        if args.flat[name] is None:
            raise UserError(f"--{name} is required")
    for name in _AT_LEAST_ONE:
        if args.flat.get(name) is not None and args.flat[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {args.flat[name]}")
    if args.data.tokenizer_chat_template and not args.data.apply_chat_template:
        raise UserError("--data.tokenizer_chat_template needs --data.apply_chat_template")
    check_model_path(args.model.model_name_or_path, "--model.model_name_or_path")
