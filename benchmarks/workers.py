"""One arm of ``train_step.py`` in a process of its own: a real trainer that stops after every round.

The trainer's own loop runs; a callback at the end of every optimizer step tells the gate, which waits for the parent
at the end of a round.
"""

import json
import sys
import tempfile
from dataclasses import dataclass

import torch
from inputs import sequence_key
from measure import first_line
from peers import make_trl_trainer, run_openrlhf_dpo
from turns import Gate

# The trainer's own flags for data of equal lengths, and for data as it comes.
PIPA_FLAGS: dict[str, list[str]] = {"equal": ["--train.share_prefixes", "false"], "natural": []}
ARMS = ("pipa", "trl_kto", "trl_kto_precomputed", "trl_dpo", "trl_dpo_precomputed", "openrlhf_dpo")


@dataclass(frozen=True)
class Spec:
    """What one worker runs.

    Attributes:
        model: folder.
        folder: scratch, with the data of ``inputs.write_data``.
        batch_size, micro_batch_size: sequences; a pair is two.
        rank: of LoRA on all linear layers but the output head.
    """

    arm: str
    section: str
    model: str
    folder: str
    dtype: str
    checkpointing: bool
    batch_size: int
    micro_batch_size: int
    steps_per_round: int
    max_length: int
    rank: int
    # So small that the log-probs of the first round are those of the initial policy.
    learning_rate: float = 1e-9
    epochs: int = 10000

    @property
    def groups_by_length(self) -> bool:
        """Equal lengths need no grouping."""
        return self.section == "natural"


class Recorder:
    """Log-probs that a trainer's own forward passes gave, by sequence."""

    def __init__(self):
        self.log_probs: dict[str, float] = {}

    def add(self, token_ids: list[int], prompt_length: int, log_prob: torch.Tensor) -> None:
        """Keep the first value of a sequence: that of the initial policy."""
        self.log_probs.setdefault(sequence_key(token_ids, prompt_length), float(log_prob))

    def sequences(self) -> dict:
        """As the reply to ``sequences``."""
        return {"log_probs": self.log_probs}


def run_pipa(spec: Spec, gate: Gate) -> None:
    """``pipa_openrlhf.cli.train_pipa`` as a user runs it, with a callback."""
    from pipa_openrlhf.cli.flags import parse
    from pipa_openrlhf.prior.cache import PriorCache
    from pipa_openrlhf.prior.fill import fill_from_policy
    from pipa_openrlhf.training.run import train
    from pipa_openrlhf.training.trainer import Callback

    class Rounds(Callback):
        """Waits where the loop begins and after every optimizer step."""

        def on_train_begin(self, trainer):
            trained: list[float] = []

            def record(module, args, output) -> None:
                if output.loss is not None:  # a training step, where log f is 0 outside the loss
                    trained.extend(output.log_f.detach().double().sum(dim=1).tolist())

            hook = trainer.actor.model.module.register_forward_hook(record)

            def sequences() -> dict:
                # From the cache, by sequence; from the training steps, whose rows are in an order of their own.
                hook.remove()
                cached = {
                    sequence_key(one.input_ids, one.prompt_len): float(trainer.cache.log_probs(one).sum(dtype="f8"))
                    for one in trainer.train_set.samples
                }
                return {"log_probs": cached, "trained": sorted(trained)}

            def prior_pass() -> None:
                with tempfile.TemporaryDirectory(dir=spec.folder) as folder:
                    cache = PriorCache(folder, "again", spec.dtype)
                    samples, pad = trainer.train_set.samples, trainer.pad_token_id
                    fill_from_policy(trainer.config, cache, samples, trainer.actor, trainer.strategy, pad)

            gate.sequences, gate.prior_pass = sequences, prior_pass
            gate.start()

        def on_step_end(self, trainer, row):
            gate.step_done()

    train(parse("train_pipa", pipa_flags(spec)), [Rounds()])


def pipa_flags(spec: Spec) -> list[str]:
    """The command line of our arm."""
    return [
        *_common_flags(spec),
        *("--train.batch_size", str(spec.batch_size), "--train.micro_batch_size", str(spec.micro_batch_size)),
        *("--ds.param_dtype", spec.dtype, "--data.dataset", f"{spec.folder}/answers.jsonl"),
        *("--ckpt.output_dir", f"{spec.folder}/pipa", "--prior.cache_dir", f"{spec.folder}/prior"),
        *PIPA_FLAGS[spec.section],
    ]


def _common_flags(spec: Spec) -> list[str]:
    return [
        *("--model.model_name_or_path", spec.model, "--ds.zero_stage", "2", "--ds.attn_implementation", "sdpa"),
        *("--ds.lora.rank", str(spec.rank), "--ds.lora.alpha", str(spec.rank), "--adam.lr", str(spec.learning_rate)),
        *("--train.max_epochs", str(spec.epochs), "--data.max_len", str(spec.max_length)),
        *(["--model.gradient_checkpointing_enable"] if spec.checkpointing else []),
    ]


def run_openrlhf(spec: Spec, gate: Gate) -> None:
    """OpenRLHF's own train_dpo."""
    recorder = Recorder()
    gate.sequences = recorder.sequences

    def on_start(trainer) -> None:
        forward = trainer.concatenated_forward

        def forward_and_record(model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
            result = forward(model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
            for ids, mask, log_probs in ((chosen_ids, c_mask, result[0]), (reject_ids, r_mask, result[1])):
                for row, log_prob in enumerate(log_probs):
                    recorder.add(ids[row][mask[row].bool()].tolist(), prompt_id_lens[row], log_prob)
            return result

        def without_recorder() -> dict:
            trainer.concatenated_forward = forward
            return recorder.sequences()

        trainer.concatenated_forward = forward_and_record
        gate.sequences = without_recorder
        gate.start()

    flags = [
        *_common_flags(spec),
        *("--train.batch_size", str(spec.batch_size // 2)),
        *("--train.micro_batch_size", str(spec.micro_batch_size // 2)),
        *("--data.dataset", f"{spec.folder}/openrlhf.jsonl", "--data.prompt_key", "prompt"),
        *("--ckpt.output_dir", f"{spec.folder}/openrlhf"),
    ]
    run_openrlhf_dpo(flags, lambda step, logs: gate.step_done(), on_start, spec.dtype)


def run_trl(spec: Spec, gate: Gate, method: str, precomputed: bool) -> None:
    """TRL's trainer, stopped by a callback."""
    from transformers import TrainerCallback

    class Rounds(TrainerCallback):
        """Waits where the loop begins and after every optimizer step."""

        def on_train_begin(self, *args, **kwargs):
            gate.start()

        def on_step_end(self, *args, **kwargs):
            gate.step_done()

    trainer = make_trl_trainer(spec, method, precomputed, Rounds())
    recorder = Recorder()

    def record(module, args, kwargs, output) -> None:
        labels, mask = kwargs["labels"], kwargs["attention_mask"].bool()
        for row, log_probs in enumerate(output.log_probs.detach()):
            prompt_length = int((labels[row] != -100).long().argmax())
            recorder.add(kwargs["input_ids"][row][mask[row]].tolist(), prompt_length, log_probs.double().sum())

    hook = trainer.model.register_forward_hook(record, with_kwargs=True)

    def without_hook() -> dict:
        hook.remove()
        return recorder.sequences()

    gate.sequences = without_hook
    trainer.train()


def main() -> None:
    """Run the arm that the command line describes until the parent says ``quit``."""
    spec = Spec(**json.loads(sys.argv[1]))
    gate = Gate(spec.steps_per_round, _import_everything)
    try:
        if spec.arm == "pipa":
            run_pipa(spec, gate)
        elif spec.arm == "openrlhf_dpo":
            run_openrlhf(spec, gate)
        else:
            run_trl(spec, gate, spec.arm.split("_")[1], spec.arm.endswith("precomputed"))
    except BaseException as error:
        gate.reply({"error": first_line(error)})
        raise


def _import_everything() -> None:
    """The same imports in every arm, before memory is looked at: an arm's figure is its models and activations."""
    import trl  # noqa: F401

    import pipa_openrlhf.training.run  # noqa: F401


if __name__ == "__main__":
    main()
