"""What a trained model says of every token of some answers: g and the log-ratio, for ``report`` to draw.

python -m pipa_openrlhf.cli.credit --model.model_name_or_path runs/pipa --data.dataset answers.jsonl \
  --credit.problems 7 12 --credit.output credit.jsonl
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.config import MODEL_FLAG, DataConfig, ModelSource, NumericsConfig, SeedConfig
from pipa_openrlhf.errors import UserError, check_downloads, check_model_path
from pipa_openrlhf.settings import check_bounds, setting

PRIOR_FLAG = "--credit.prior"


@dataclass(frozen=True)
class CreditSettings:
    """Which answers, and where the numbers go."""

    output: str | None = setting(None, "JSONL, a row an answer, for --report.credit", is_written=True)
    problems: Sequence[str] = setting((), "problem_id of the answers; unset: the first answers", nargs="+")
    max_answers: int = setting(10, "most answers where no problem is named", least=1)
    prior: str | None = setting(
        None, "model that log-ratios are against; unset: the one that the run compared with", is_path=True
    )


@dataclass(frozen=True)
class CreditConfig:
    """Of this command: a trained model, and labelled answers as training reads them."""

    model: ModelSource = field(default_factory=ModelSource)
    ds: NumericsConfig = field(default_factory=NumericsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: SeedConfig = field(default_factory=SeedConfig)
    credit: CreditSettings = field(default_factory=CreditSettings)
    use_ms: bool = setting(False, "download from ModelScope")

    def check(self) -> None:
        """Raises UserError."""
        if self.credit.output is None:
            raise UserError("--credit.output is required")
        if os.path.realpath(self.credit.output) == os.path.realpath(self.data.dataset or ""):
            raise UserError(f"--credit.output {self.credit.output} is --data.dataset itself: choose another file")
        check_bounds(self)
        self.data.check()
        check_downloads(self.use_ms)
        check_model_path(self.model.path, MODEL_FLAG)


def main(config: CreditConfig) -> None:
    config.check()
    from pipa_openrlhf.data.dataset import load_samples
    from pipa_openrlhf.distributed.strategy import device, dtype_of
    from pipa_openrlhf.evaluate.credit import chosen, credit_rows, prior_of, token_log_probs, token_values
    from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer, resolve_attention, use_modelscope
    from pipa_openrlhf.model.policy import HEAD_WEIGHTS_FILE
    from pipa_openrlhf.model.value_model import ValueModel, load_fitting_head

    if config.use_ms:
        use_modelscope()
    flags, path, remote = config.credit, config.model.path, config.model.trust_remote_code
    prior_path = flags.prior or prior_of(path)
    check_model_path(prior_path, PRIOR_FLAG)
    tokenizer = load_tokenizer(path, use_fast=not config.data.disable_fast_tokenizer, trust_remote_code=remote)
    data = load_samples(config, tokenizer, dataset=config.data.dataset, split=config.data.dataset_split).samples
    samples = chosen(data, flags.problems, flags.max_answers)
    dtype = config.ds.param_dtype
    kernels = resolve_attention(config.ds.attn_implementation, dtype)

    def load(path: str):
        model = load_causal_lm(path, dtype_of(dtype), kernels, remote).eval()
        return model.to(device())

    policy = load(path)
    # DPO and KTO train no value head.
    has_head = os.path.exists(os.path.join(path, HEAD_WEIGHTS_FILE))
    values = token_values(ValueModel(policy, load_fitting_head(path, policy)), samples) if has_head else None
    log_f = token_log_probs(policy, samples)
    del policy
    log_p = token_log_probs(load(prior_path), samples)
    rows = list(credit_rows(samples, tokenizer, values, log_f, log_p))
    os.makedirs(os.path.dirname(os.path.abspath(str(flags.output))), exist_ok=True)
    with open(str(flags.output), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    what = "g and log-ratio" if has_head else f"log-ratio (there is no value head in {path})"
    print(f"{len(rows)} answers, {what} of each token against {prior_path}: {flags.output}", flush=True)


def cli() -> int:
    """Console entry point."""
    return run(main, "credit")


if __name__ == "__main__":
    sys.exit(cli())
