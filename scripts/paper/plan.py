"""What the commands of scripts/paper would do: each checked by the parser that it meets, with an estimate of its cost.

    bash scripts/paper/run_table1.sh --dry_run

Commands come by standard input, one a line; the same one is shown once. docs/paper.md says how memory and hours are
estimated. Nothing is loaded or downloaded.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pipa_openrlhf.cli.flags import parse  # noqa: E402
from pipa_openrlhf.config import RunConfig  # noqa: E402
from pipa_openrlhf.errors import UserError  # noqa: E402
from pipa_openrlhf.generate.config import EvaluateConfig, SampleConfig  # noqa: E402
from pipa_openrlhf.settings import updated  # noqa: E402
from recipes.one_pair import PairsConfig  # noqa: E402

PREFIX = "pipa_openrlhf.cli."
PAIRS = "recipes.one_pair"
MODELS = {"deepseek": "DeepSeek-Math-7B", "qwen": "Qwen2.5-Math-7B"}  # by a part of the name
LENGTH = 2048  # of the sequences whose memory and FLOPs are counted
# Assumed until prepare_alphamath has counted: the published file has 215 MB, of which this share is prompts and
# answers, and these shares of the text are in right answers, and in answers that find a partner.
RAW_CHARACTERS, TEXT_SHARE, RIGHT_SHARE, PAIRED_SHARE = 215e6, 0.85, 0.4, 0.6
CHARACTERS_A_TOKEN = 3.0  # mathematics and code
PROBLEMS = {"gsm8k": 1319, "math": 5000}
# Assumed of answers that a model samples: their length with the prompt; problems that have right and wrong ones.
TOKENS_AN_ANSWER, MIXED_SHARE = 350, 0.5
# Of generation: what the longest of a batch of answers is like, and the time of a token of a batch.
TOKENS_A_BATCH, SECONDS_A_TOKEN = 1024, 0.04


@dataclass(frozen=True)
class Machine:
    """What the estimate takes for granted: GPUs, their peak in TFLOP/s, and the share of it that is reached."""

    gpus: int
    tflops: float
    utilisation: float

    def hours(self, flops: float) -> float:
        """GPU-hours."""
        return flops / (self.tflops * 1e12 * self.utilisation) / 3600


@dataclass
class Plan:
    """Commands checked so far.

    Attributes:
        outputs: folders that they make.
        sampled: problems and answers in a file that a command makes.
        base: of a folder that they make, the released model that it comes from.
        scored: prior, data and pairing whose log-probs are in the cache by then.
    """

    machine: Machine
    outputs: set[str] = field(default_factory=set)
    sampled: dict[str, tuple[float, float]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    scored: set[tuple] = field(default_factory=set)
    hours: float = 0.0

    def add(self, line: str) -> str:
        """What is said of a command.

        Raises:
            UserError: it would be refused, or needs what no command before it makes.
        """
        words = shlex.split(line)
        if PAIRS in words:
            return self._pairs(parse(PairsConfig, words[words.index(PAIRS) + 1 :]))
        # The last one: a launcher of this package may stand before it.
        place = max(index for index, word in enumerate(words) if word.startswith(PREFIX))
        config = parse(words[place].removeprefix(PREFIX), words[place + 1 :])
        if isinstance(config, RunConfig):
            return self._training(config)
        if isinstance(config, EvaluateConfig):
            return self._evaluation(config)
        if isinstance(config, SampleConfig):
            return self._sampling(config)
        config.check()
        self.outputs.add(config.output_dir)
        return "reads and writes the data"

    def _training(self, config: RunConfig) -> str:
        self._check(config, ("model.model_name_or_path", "prior.model_name_or_path"))
        folder = os.path.dirname(str(config.data.dataset))
        if not ({folder, config.data.dataset} & (self.outputs | self.sampled.keys()) or os.path.exists(folder)):
            raise UserError(f"--data.dataset {config.data.dataset}: no command before makes it")
        start, output = config.model.path, config.ckpt.output_dir
        self.outputs.add(output)
        self.base[output] = self.base.get(start, start)
        model = _model_of(self.base[output])
        if model is None:
            return "no estimate: not a model of the paper"
        _, answers = self.sampled.get(str(config.data.dataset), (0, 0))
        tokens = answers * TOKENS_AN_ANSWER or _tokens(config, folder)
        costs = flops_a_token(model)
        flops = config.train.max_epochs * tokens * costs["step"]
        is_kto = config.objective.flag_group == "kto"
        if is_kto:
            flops += config.train.max_epochs * tokens * costs["forward"]
        if config.objective.flag_group != "sft":
            flops += self._prior_passes(config, is_kto) * tokens * costs["forward"]
        hours = self.machine.hours(flops)
        self.hours += hours
        memory = step_memory(model, (config.train.max_tokens_per_micro_batch or LENGTH) // LENGTH, self.machine.gpus)
        return f"{tokens / 1e6:.0f} M tokens, about {memory:.0f} GiB a GPU, {hours:.1f} GPU-hours"

    def _prior_passes(self, config: RunConfig, is_kto: bool) -> int:
        """Passes over the data that no command before has cached; KTO's mismatches are one of their own."""
        key = (config.prior_path or config.model.path, config.data.dataset, config.data.pairing)
        wanted = {key, (*key, "mismatched")} if is_kto else {key}
        if (key[0], key[1], "auto") in self.scored:
            wanted.discard(key)  # pairs are a part of all answers
        new = wanted - self.scored
        self.scored |= wanted
        return len(new)

    def _evaluation(self, config: EvaluateConfig) -> str:
        self._check(config, ("model.model_name_or_path",))
        if _model_of(self.base.get(config.model.path, config.model.path)) is None:
            return "no estimate: not a model of the paper"
        name = config.evaluate.folder.rsplit("_", 1)[-1]
        problems = PROBLEMS.get(name, 0)
        beams = config.sbs.beams * config.sbs.samples if config.evaluate.decode == "sbs" else 1
        hours = self._generation(problems * beams, config.evaluate.batch_size)
        return f"{problems} problems on one GPU, about {hours:.1f} hours"

    def _sampling(self, config: SampleConfig) -> str:
        self._check(config, ("model.model_name_or_path",))
        problems = config.problems.max or 0
        answers = problems * config.sample.num_answers
        self.sampled[config.sample.path] = problems, answers
        hours = self._generation(answers, config.sample.batch_size)
        return f"{answers} answers on one GPU, about {hours:.1f} hours"

    def _pairs(self, config: PairsConfig) -> str:
        if config.answers not in self.sampled:
            raise UserError(f"--answers {config.answers}: no command before makes it")
        problems, _ = self.sampled[config.answers]
        self.sampled[str(config.output)] = problems, 2 * MIXED_SHARE * problems
        return f"about {MIXED_SHARE * problems:.0f} pairs"

    def _generation(self, answers: int, batch_size: int) -> float:
        """Hours, which are added to the sum."""
        hours = -(-answers // batch_size) * TOKENS_A_BATCH * SECONDS_A_TOKEN / 3600
        self.hours += hours
        return hours

    def _check(self, config: Any, paths: Iterable[str]) -> None:
        """The command's own check; what commands before make stands for a model of the hub."""
        made = {name: "made/before" for name in paths if self._value(config, name) in self.outputs}
        updated(config, made).check()

    @staticmethod
    def _value(config: Any, name: str) -> str | None:
        group, field_name = name.split(".")
        return getattr(getattr(config, group), field_name)


def _model_of(base: str) -> str | None:
    return next((shape for part, shape in MODELS.items() if part in base.lower()), None)


def _tokens(config: RunConfig, folder: str) -> float:
    """Of a pass over the data: counted characters where the data are prepared, assumed ones otherwise."""
    right, wrong, paired = _characters(folder)
    if config.objective.flag_group == "sft":
        characters = {"positive": right, "negative": wrong, "all": right + wrong}[config.objective.keep]
    else:
        characters = paired if config.data.pairing == "match" else right + wrong
    return characters / CHARACTERS_A_TOKEN


def _characters(folder: str) -> tuple[float, float, float]:
    """Of right, wrong and paired answers, prompts included."""
    try:
        counts = json.loads(Path(folder, "counts.json").read_text())
    except FileNotFoundError:
        text = RAW_CHARACTERS * TEXT_SHARE
        return text * RIGHT_SHARE, text * (1 - RIGHT_SHARE), text * PAIRED_SHARE
    right, wrong = counts["right_characters"], counts["wrong_characters"]
    each = right / max(counts["right"], 1) + wrong / max(counts["wrong"], 1)
    return right, wrong, counts["pairs"] * each


@cache
def flops_a_token(model: str) -> dict[str, float]:
    """Counted on the meta device: of a training step with gradient checkpointing, and of a forward pass."""
    from least import count_shapes

    counted = count_shapes(model, LENGTH)
    backbone, head = counted["2b"] / 2, counted["2h x loss tokens"] / 2
    # Without checkpointing the step was counted; with it the backbone's forward pass runs twice.
    return {"step": (counted["step"] + backbone) / LENGTH, "forward": (backbone + head) / LENGTH}


@cache
def step_memory(model: str, sequences: int, gpus: int) -> float:
    """GiB of a PIPA-M step, counted on the meta device, with float32 masters and Adam shared out over the GPUs."""
    from memory_7b import GIB, PARTS, our_step
    from shapes import MODELS as SHAPES

    counted = our_step(SHAPES[model], sequences)
    return (counted["peak"] - counted[PARTS[2]] * (1 - 1 / gpus)) / GIB


def report(lines: Iterable[str], machine: Machine) -> Iterator[str]:
    """Each command once, with what is said of it, and the sum."""
    plan = Plan(machine)
    seen: set[str] = set()
    for line in map(str.strip, lines):
        if line in seen or not line:
            continue
        seen.add(line)
        yield line
        if not line.startswith("#"):
            yield f"    # {plan.add(line)}"
    count = sum(not line.startswith("#") for line in seen)
    yield (
        f"{count} commands, every flag as its parser takes it. An estimate, nothing of it was measured: about "
        f"{plan.hours:.0f} GPU-hours, at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s in training"
    )


def main() -> int:
    """Print the report; exit status 1 where a command would be refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=int(os.environ.get("GPUS", 8)))
    parser.add_argument(
        "--tflops", type=float, default=float(os.environ.get("TFLOPS", 989)), help="bf16 peak of a GPU"
    )
    parser.add_argument("--utilisation", type=float, default=float(os.environ.get("UTILISATION", 0.35)))
    options = parser.parse_args()
    try:
        for line in report(sys.stdin, Machine(**vars(options))):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
