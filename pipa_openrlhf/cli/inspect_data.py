"""Look at data as training will see it: counts, lengths, what is dropped, and labels token by token.

python -m pipa_openrlhf.cli.inspect_data --data.dataset data.jsonl --model.model_name_or_path TOKENIZER
"""

import os
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.config import DataConfig, ModelSource, NumericsConfig, SeedConfig
from pipa_openrlhf.data.dataset import LoadedData, load_samples
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.errors import UserError, check_downloads
from pipa_openrlhf.settings import check_bounds, setting

PERCENTILES = (0, 50, 90, 99, 100)
SHOWN_OF_EACH_LABEL = 2
GREEN, RED, GREY, DIM, RESET = "\033[32m", "\033[31m", "\033[90m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class InspectConfig:
    """Of this command: the data as training reads it, and a tokenizer."""

    model: ModelSource = field(default_factory=ModelSource)
    ds: NumericsConfig = field(default_factory=NumericsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: SeedConfig = field(default_factory=SeedConfig)
    use_ms: bool = setting(False, "download from ModelScope")

    def check(self) -> None:
        """Raises UserError."""
        check_bounds(self)
        self.data.check()
        check_downloads(self.use_ms)
        if not self.model.model_name_or_path:
            raise UserError("--model.model_name_or_path is not given: name the model whose tokenizer is used")


def main(config: InspectConfig) -> None:
    """Print everything about the data that the flags describe."""
    config.check()
    from pipa_openrlhf.model.loading import load_tokenizer  # imports torch: flags are checked before

    tokenizer = load_tokenizer(
        config.model.path,
        use_fast=not config.data.disable_fast_tokenizer,
        trust_remote_code=config.model.trust_remote_code,
    )
    loaded = load_samples(
        config,
        tokenizer,
        dataset=config.data.dataset,
        probs=config.data.dataset_probs,
        split=config.data.dataset_split,
    )
    print()
    print("\n".join(summary(loaded)))
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for sample in _examples(loaded.samples):
        print()
        print(f"{sample.where}: answer label {sample.answer_label}, {len(sample.input_ids)} tokens")
        print(paint(sample, tokenizer, coloured))


def summary(loaded: LoadedData) -> list[str]:
    """Lines about the whole data set."""
    samples = loaded.samples
    right = int(samples.column("answer_label").sum())
    labelled = int(samples.column("loss_tokens").sum(dtype=np.int64))
    right_tokens = int(samples.column("right_tokens").sum(dtype=np.int64))
    prompt = samples.column("prompt_len")
    response = samples.column("length") - prompt
    masked = int(response.sum(dtype=np.int64)) - labelled
    problems = len(np.unique(samples.column("problem")))
    lines = [
        f"answers   {loaded.num_records} read, {len(samples)} used, of {problems} problems",
        f"labels    answers: {_share(right, len(samples))}; tokens: {_share(right_tokens, labelled)}",
        "labelled  " + ", ".join(f"{count} by {source}" for source, count in loaded.label_sources.items()),
        f"skipped   {len(loaded.bad_rows)} rows that cannot be read",
        f"masked    {masked} response tokens outside every loss",
        f"length    {'':10}" + "".join(f"{f'{p}%':>8}" for p in PERCENTILES),
    ]
    for name, lengths in (("prompt", prompt), ("response", response), ("total", prompt + response)):
        lines.append(
            f"          {name:10}" + "".join(f"{value:8.0f}" for value in np.percentile(lengths, PERCENTILES))
        )
    for reason, count in sorted(loaded.dropped.items(), key=lambda item: -item[1]):
        lines.append(f"dropped   {count} {reason}")
    return lines


def _share(right: int, total: int) -> str:
    return f"{right} right ({100 * right / max(total, 1):.1f} %), {total - right} wrong"


def _examples(samples: Samples) -> list[Sample]:
    """The first few of each answer label, in data order."""
    labels = samples.column("answer_label")
    first = [np.flatnonzero(labels == label)[:SHOWN_OF_EACH_LABEL] for label in (0, 1)]
    return list(samples[np.sort(np.concatenate(first))])


def paint(sample: Sample, tokenizer, coloured: bool) -> str:
    """The sample's text with the label of every token: in colour, or with a mark before each stretch."""
    painted, shown = "", ""
    for _, end, step, label in stretches(sample):
        # Decoding a stretch on its own would lose the spaces that some tokenizers put in front.
        whole = tokenizer.decode(sample.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, shown = whole[len(shown) :].replace("\033", "\\033"), whole
        if not coloured:
            painted += {None: "[prompt]", -1: f"[step {step + 1}: masked]"}.get(label, f"[step {step + 1}: {label}]")
            painted += text
        else:
            painted += {None: DIM, -1: GREY, 0: RED, 1: GREEN}[label] + text + RESET
    return painted


def stretches(sample: Sample) -> list[tuple[int, int, int, int | None]]:
    """``(first token, end, step, label)`` of tokens that belong together; label None: the prompt, -1: masked."""
    shown = np.where(sample.mask == 1, sample.labels, -1)
    kinds = list(zip(sample.step_ids.tolist(), shown.tolist(), strict=True))
    edges = [index for index in range(len(kinds)) if index == 0 or kinds[index] != kinds[index - 1]] + [len(kinds)]
    answer = [(sample.prompt_len + start, sample.prompt_len + end, *kinds[start]) for start, end in pairwise(edges)]
    return [(0, sample.prompt_len, 0, None), *answer] if sample.prompt_len else answer


def cli(argv: list[str] | None = None) -> int:
    """Console entry point."""
    return run(main, "inspect_data", argv)


if __name__ == "__main__":
    sys.exit(cli())
