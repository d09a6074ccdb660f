"""Problems that a model is to answer, and the file that gets what came of them."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.data.render import use_chat_template
from pipa_openrlhf.distributed.strategy import device, dtype_of, slow_dtype_hint
from pipa_openrlhf.evaluate.grading import grader_name
from pipa_openrlhf.generate.config import GenerateConfig, WriterConfig
from pipa_openrlhf.generate.problems import Problem, RowFile, digest_of, read_problems
from pipa_openrlhf.generate.prompts import write_prompts
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings, plan_batches, sample_batches
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer, resolve_attention, use_modelscope
from pipa_openrlhf.prior.cache import weights_id
from pipa_openrlhf.remembered import user_cache_dir

log = logging.getLogger(__name__)

# From problems with all their answers to as many rows each, so that answers are graded together.
MakeRows = Callable[[list[tuple[Problem, list[Answer]]]], list[list[dict]]]


@dataclass(frozen=True)
class Job:
    """Problems that a model is to answer.

    Attributes:
        source: where the problems are from.
        prompts: of the problems, shielded as ``special_text.py`` says.
    """

    config: WriterConfig
    source: str
    problems: list[Problem]
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingSettings

    def description(self) -> dict:
        """Everything the answers depend on, as JSON."""
        config = self.config
        return {
            "model": config.model.path,
            "weights": weights_id(config.model.path, user_cache_dir("prior")),
            "dtype": config.ds.param_dtype,
            "problems": self.source,
            "num_problems": len(self.problems),
            "problems_sha256": digest_of(self.problems),
            "grader": grader_name(),
            "first_prompt": self.prompts[0],
            **asdict(self.sampling),
            **config.vllm.description(),
        }

    def load_model(self) -> PreTrainedModel:
        config = self.config
        if hint := slow_dtype_hint(config.ds.param_dtype):
            log.info(hint)
        model = load_causal_lm(
            config.model.path,
            dtype_of(config.ds.param_dtype),
            resolve_attention(config.ds.attn_implementation, config.ds.param_dtype),
            trust_remote_code=config.model.trust_remote_code,
            experts_implementation=config.ds.experts_implementation,
        )
        return model.to(device())  # type: ignore[arg-type]  # transformers' decorator hides that it is a method


def prepare_job(config: GenerateConfig, sampling: SamplingSettings) -> Job:
    """Read everything but the model's weights, so that most mistakes show within seconds.

    Raises:
        UserError: a flag is missing or wrong, or the problem file cannot be read.
    """
    config.check()
    if config.use_ms:
        use_modelscope()
    path = config.problems.path
    problems = read_problems(path, config.problems.max, config.problems.split, config.use_ms)
    tokenizer = load_writer(config)
    prompts, stop = write_prompts(problems, tokenizer, config)
    return Job(config, path, problems, prompts, tokenizer, replace(sampling, stop=stop))


def load_writer(config: WriterConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that writes prompts, with the chat template that the flags name.

    Raises:
        UserError: there is none, or the template cannot be used.
    """
    tokenizer = load_tokenizer(
        config.model.path,
        use_fast=not config.data.disable_fast_tokenizer,
        trust_remote_code=config.model.trust_remote_code,
        padding_side="left",
    )
    if config.data.apply_chat_template:
        use_chat_template(tokenizer, config.data.tokenizer_chat_template)
    return tokenizer


# Each batch's indices into the job's problems with the answers to these.
Answers = Iterator[tuple[list[int], list[list[Answer]]]]
Decode = Callable[[Job, list[list[int]]], Answers]


def sample(job: Job, batches: list[list[int]]) -> Answers:
    """Answers of the engine that the flags name."""
    if job.config.vllm.enable:
        from pipa_openrlhf.generate.vllm_engine import vllm_batches

        return vllm_batches(job.config, job.tokenizer, job.prompts, batches, job.sampling)
    return sample_batches(job.load_model(), job.tokenizer, job.prompts, batches, job.sampling)


def run_job(job: Job, file: RowFile, make_rows: MakeRows, title: str, decode: Decode = sample) -> None:
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
    total = len(job.problems) * len(samples)
    hidden = os.environ.get("RANK", "0") != "0"
    with tqdm(total=total, initial=len(done), desc=title, unit="answer", dynamic_ncols=True, disable=hidden) as bar:
        for batch, answers in decode(job, batches):
            problems = [job.problems[index] for index in batch]
            rows = [
                {"problem_id": problem.problem_id, "sample": sample} | row
                for problem, of_problem in zip(problems, make_rows(list(zip(problems, answers))))
                for sample, row in enumerate(of_problem)
                if (problem.problem_id, sample) not in done
            ]
            file.append(rows)
            bar.update(len(rows))
