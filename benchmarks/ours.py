"""Our arm: ``train_pipa`` as a user runs it, stopped after every round; and the same with prompts shared alone."""

import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
from inputs import character_tokenizer, sequence_key
from least import least_parts, record_calls
from turns import Gate, Spec

from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.data import batch as batch_module
from pipa_openrlhf.data import plan as plan_module
from pipa_openrlhf.data.samples import Sample
from pipa_openrlhf.prior.cache import PriorCache
from pipa_openrlhf.prior.fill import fill_from_policy
from pipa_openrlhf.training.run import train
from pipa_openrlhf.training.trainer import Callback


class Rounds(Callback):
    """Waits where the loop begins and after every optimizer step."""

    def __init__(self, spec: Spec, gate: Gate):
        self._spec = spec
        self._gate = gate

    def on_train_begin(self, trainer):
        samples = trainer.train_set.samples
        policy = trainer.actor.model.module
        trained: list[float] = []

        def record(module, args, output) -> None:
            if output.loss is not None:  # a training step, where log f is 0 outside the loss
                trained.extend(output.log_f.detach().double().sum(dim=1).tolist())

        hook = policy.register_forward_hook(record)
        calls, calls_hook = record_calls(policy)

        def sequences() -> dict:
            # From the cache, by sequence; from the training steps, whose rows are in an order of their own.
            hook.remove()
            keys = [sequence_key(one.input_ids, one.prompt_len) for one in samples]
            sums = [float(trainer.cache.log_probs(one).sum(dtype="f8")) for one in samples]
            return {"log_probs": dict(zip(keys, sums)), "trained": sorted(trained)}

        def least() -> dict:
            calls_hook.remove()
            return least_parts(policy, calls, *distinct(samples))

        def prior_pass() -> None:
            with tempfile.TemporaryDirectory(dir=self._spec.folder) as folder:
                cache = PriorCache(folder, "again", self._spec.dtype)
                fill_from_policy(trainer.config, cache, samples, trainer.actor, trainer.strategy, trainer.pad_token_id)

        self._gate.replies.update(sequences=sequences, least=least)
        self._gate.prior_pass = prior_pass
        self._gate.start()

    def on_step_end(self, trainer, row):
        self._gate.step_done()


def distinct(samples: Iterable[Sample]) -> tuple[int, int]:
    """Tokens that a model must see and tokens that it must score, each with all before it once: beginnings of
    sequences, the last token of which is a target only."""
    seen, scored = set(), set()
    for one in samples:
        for end in range(1, len(one.input_ids)):
            seen.add(one.input_ids[:end].tobytes())
        for place in np.flatnonzero(one.mask):
            scored.add(one.input_ids[: one.prompt_len + place + 1].tobytes())
    return len(seen), len(scored)


def run(spec: Spec, gate: Gate) -> None:
    """``pipa_openrlhf.cli.train_pipa``; in the arm ``pipa_prompts`` with the prefix tree cut where prompts end."""
    tokenizer = character_tokenizer()
    rows = map(json.loads, Path(spec.folder, "answers.jsonl").read_text().splitlines())
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    with prompts_shared_alone(prompts) if spec.arm == "pipa_prompts" else nullcontext():
        train(parse("train_pipa", pipa_flags(spec)), [Rounds(spec, gate)])


@contextmanager
def prompts_shared_alone(prompts: list[list[int]]):
    """Prefix trees whose branches are prompts: what follows one is made different in every sequence that trees are
    made of. Tokens themselves are laid out from the samples, which stay as they are.

    Args:
        prompts: of all sequences; none of them is the beginning of another.
    """
    known = {tuple(prompt) for prompt in prompts}
    lengths = sorted({len(prompt) for prompt in prompts})

    def apart(sequences: list[np.ndarray]) -> list[np.ndarray]:
        changed = []
        for number, ids in enumerate(sequences, start=1):
            end = next(length for length in lengths if tuple(ids[:length].tolist()) in known)
            # Larger than any token, and a number of its own in every sequence.
            own = np.full(len(ids) - end, number << 20, dtype=np.int64)
            changed.append(np.concatenate([ids[:end], own]))
        return changed

    def cut(make: Callable) -> Callable:
        return lambda sequences: make(apart(sequences))

    with (
        patch.object(batch_module, "share_prefixes", cut(batch_module.share_prefixes)),
        patch.object(plan_module, "PrefixTree", cut(plan_module.PrefixTree)),
    ):
        yield


def pipa_flags(spec: Spec) -> list[str]:
    """The command line of our arm."""
    return [
        *common_flags(spec),
        *("--train.batch_size", str(spec.batch_size), "--train.micro_batch_size", str(spec.micro_batch_size)),
        *("--ds.param_dtype", spec.dtype, "--data.dataset", f"{spec.folder}/answers.jsonl"),
        *("--ckpt.output_dir", f"{spec.folder}/{spec.arm}", "--prior.cache_dir", f"{spec.folder}/{spec.arm}_prior"),
    ]


def common_flags(spec: Spec) -> list[str]:
    """Those of ours that are OpenRLHF's too."""
    return [
        *("--model.model_name_or_path", spec.model, "--ds.zero_stage", "2", "--ds.attn_implementation", "sdpa"),
        *("--ds.lora.rank", str(spec.rank), "--ds.lora.alpha", str(spec.rank), "--adam.lr", str(spec.learning_rate)),
        *("--train.max_epochs", str(spec.epochs), "--data.max_len", str(spec.max_length)),
        *(["--model.gradient_checkpointing_enable"] if spec.checkpointing else []),
    ]
