"""Settings of sampling and evaluation."""

from dataclasses import dataclass, field

from pipa_openrlhf.config import (
    ModelSource,
    NumericsConfig,
    SeedConfig,
    TemplateConfig,
    check_downloads,
    check_model_path,
)
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import check_bounds, setting


@dataclass(frozen=True)
class ProblemsConfig:
    """Which problems are answered."""

    file: str | None = setting(None, "JSONL with question or prompt, answer, optionally steps")
    max: int | None = setting(None, "most problems used, from the top; unset: all", least=1)


@dataclass(frozen=True)
class GenerateConfig:
    """A model, a file of problems, and how prompts are written."""

    model: ModelSource = field(default_factory=ModelSource)
    ds: NumericsConfig = field(default_factory=NumericsConfig)
    data: TemplateConfig = field(default_factory=TemplateConfig)
    train: SeedConfig = field(default_factory=SeedConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    use_ms: bool = setting(False, "download from ModelScope")

    def check(self) -> None:
        """Raises UserError."""
        if self.problems.file is None:
            raise UserError("--problems.file is required")
        check_bounds(self)
        self.data.check()
        check_downloads(self.use_ms)
        check_model_path(self.model.model_name_or_path, "--model.model_name_or_path")


@dataclass(frozen=True)
class SampleSettings:
    """How answers are drawn and where they go."""

    output: str | None = setting(None, "JSONL of labelled answers; continued if it exists")
    num_answers: int = setting(4, "answers a problem", least=1)
    temperature: float = setting(0.7, "sampling temperature; 0: greedy", least=0)
    top_p: float = setting(1.0, "nucleus sampling; 1: off", above=0, most=1)
    max_new_tokens: int = setting(512, "longest answer; a longer one is labelled wrong", least=1)
    batch_size: int = setting(96, "answers generated at a time", least=1)


@dataclass(frozen=True)
class SampleConfig(GenerateConfig):
    """Of ``cli/sample.py``."""

    sample: SampleSettings = field(default_factory=SampleSettings)

    def check(self) -> None:
        """Raises UserError."""
        if self.sample.output is None:
            raise UserError("--sample.output is required")
        super().check()


@dataclass(frozen=True)
class EvaluateSettings:
    """How problems are answered and where results go."""

    output_dir: str | None = setting(None, "gets results.jsonl and summary.json")
    max_new_tokens: int = setting(512, "longest answer", least=1)
    batch_size: int = setting(96, "problems answered at a time", least=1)
    overwrite: bool = setting(False, "delete another evaluation there first")


@dataclass(frozen=True)
class EvaluateConfig(GenerateConfig):
    """Of ``cli/evaluate.py``."""

    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def check(self) -> None:
        """Raises UserError."""
        if self.evaluate.output_dir is None:
            raise UserError("--evaluate.output_dir is required")
        super().check()
