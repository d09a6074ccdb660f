"""How well the value head of a trained model tells right steps from wrong ones, on data with step labels.

python -m pipa_openrlhf.cli.evaluate_value --model.model_name_or_path runs/pipa --data.dataset steps.jsonl
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.config import MODEL_FLAG, DataConfig, ModelSource, NumericsConfig, SeedConfig
from pipa_openrlhf.errors import UserError, check_downloads, check_model_path
from pipa_openrlhf.settings import check_bounds, setting

if TYPE_CHECKING:
    from pipa_openrlhf.evaluate.value_quality import Judged

_ANSWERS_AT_ONCE = 256
_PLACES = {"after": "after the step", "last": "of its last token"}


@dataclass(frozen=True)
class ValueSettings:
    """What is measured, and where it goes."""

    output_dir: str | None = setting(None, "gets steps.jsonl, summary.json and calibration.svg", is_written=True)
    threshold: float = setting(0.5, "the first step whose value is below it is called the first wrong one")
    choose_threshold: bool = setting(
        False, "take the threshold of highest F1 on half of the problems, and report the others"
    )


@dataclass(frozen=True)
class EvaluateValueConfig:
    """Of this command: a model with a value head, and data as training reads them, by step labels."""

    model: ModelSource = field(default_factory=ModelSource)
    ds: NumericsConfig = field(default_factory=NumericsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: SeedConfig = field(default_factory=SeedConfig)
    quality: ValueSettings = field(default_factory=ValueSettings)
    use_ms: bool = setting(False, "download from ModelScope")

    def check(self) -> None:
        """Raises UserError."""
        if self.quality.output_dir is None:
            raise UserError("--quality.output_dir is required")
        check_bounds(self)
        self.data.check()
        check_downloads(self.use_ms)
        check_model_path(self.model.path, MODEL_FLAG)


def main(config: EvaluateValueConfig) -> None:
    from pipa_openrlhf.evaluate.value_quality import summarise

    config.check()
    answers = _judge(config)
    flags = config.quality
    summary = summarise(answers, flags.threshold, flags.choose_threshold)
    summary |= {"model": config.model.path, "dataset": config.data.dataset}
    _write(str(flags.output_dir), answers, summary)
    print(f"{_table(summary)}\n\n{flags.output_dir}", flush=True)


def _judge(config: EvaluateValueConfig) -> "list[Judged]":
    from tqdm import tqdm

    from pipa_openrlhf.data.dataset import load_samples
    from pipa_openrlhf.distributed.strategy import device, dtype_of
    from pipa_openrlhf.evaluate.value_quality import judge
    from pipa_openrlhf.model.loading import load_tokenizer, resolve_attention, use_modelscope
    from pipa_openrlhf.model.value_model import ValueModel, head_digest, load_value_model

    if config.use_ms:
        use_modelscope()
    path, numerics = config.model.path, config.ds
    head_digest(path)  # before the data are read
    tokenizer = load_tokenizer(
        path, use_fast=not config.data.disable_fast_tokenizer, trust_remote_code=config.model.trust_remote_code
    )
    by_steps = replace(config, data=replace(config.data, annotation="step"))
    samples = load_samples(by_steps, tokenizer, dataset=config.data.dataset, split=config.data.dataset_split).samples
    loaded = load_value_model(
        path,
        dtype_of(numerics.param_dtype),
        resolve_attention(numerics.attn_implementation, numerics.param_dtype),
        config.model.trust_remote_code,
    )
    value_model = ValueModel(loaded.lm.to(device()), loaded.head)
    answers: list[Judged] = []
    for start in tqdm(range(0, len(samples), _ANSWERS_AT_ONCE), desc="judging", dynamic_ncols=True):
        part = list(samples[start : start + _ANSWERS_AT_ONCE])
        answers += judge(value_model, part, tokenizer.eos_token_id)
    return answers


def _write(folder: str, answers: "list[Judged]", summary: dict) -> None:
    from pipa_openrlhf.evaluate.report import calibration_curves
    from pipa_openrlhf.evaluate.results import write_summary

    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "steps.jsonl"), "w", encoding="utf-8") as file:
        for one in answers:
            values = {name: [round(float(value), 6) for value in of_steps] for name, of_steps in one.values.items()}
            row = {"problem_id": one.problem_id, "where": one.where, "steps": one.steps.tolist()}
            file.write(json.dumps(row | {"labels": one.labels.tolist(), "values": values}, ensure_ascii=False) + "\n")
    curves = {f"g {_PLACES[name]}": one["calibration"] for name, one in summary["readings"].items()}
    with open(os.path.join(folder, "calibration.svg"), "w", encoding="utf-8") as file:
        file.write(calibration_curves(curves))
    write_summary(folder, summary)


def _table(summary: dict) -> str:
    from pipa_openrlhf.evaluate.results import text_table

    detections = {name: one["detection"] for name, one in summary["readings"].items()}
    sizes = next(iter(detections.values()))
    rows: list[tuple[str, ...]] = [
        ("g", "AUC", "Brier", "calibration error", "threshold", "erroneous", "correct", "F1", "95 % interval")
    ]
    for name, one in summary["readings"].items():
        found = one["detection"]
        numbers = [one["auc"], one["brier"], one["calibration_error"], found["threshold"]]
        shares = [found["erroneous"], found["correct"], found["f1"]]
        low_high = found["f1_interval_95"]
        rows.append(
            (
                _PLACES[name],
                *("-" if number is None else f"{number:.3f}" for number in numbers),
                *("-" if share is None else f"{share:.1%}" for share in shares),
                "-" if low_high is None else f"{low_high[0]:.1%} to {low_high[1]:.1%}",
            )
        )
    bins: list[tuple[str, ...]] = [("g after the step", "steps", "mean g", "right")]
    for one in summary["readings"]["after"]["calibration"]:
        low_to_high = f"{one['from']:.1f} to {one['to']:.1f}"
        bins.append((low_to_high, str(one["n"]), f"{one['mean_value']:.3f}", f"{one['share_right']:.1%}"))
    head = (
        f"{summary['steps']} labelled steps ({summary['right_steps']} right) of {summary['answers']} answers: "
        f"{sizes['n_erroneous']} erroneous, {sizes['n_correct']} correct"
    )
    return f"{head}\n\n{text_table(rows)}\n\n{text_table(bins)}"


def cli() -> int:
    """Console entry point."""
    return run(main, "evaluate_value")


if __name__ == "__main__":
    sys.exit(cli())
