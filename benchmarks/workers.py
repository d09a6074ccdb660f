"""One arm of ``train_step.py`` in a process of its own: a real trainer that stops after every round.

The trainer's own loop runs; a callback at the end of every optimizer step tells the gate, which waits for the parent
at the end of a round. Arms that need other versions of torch's ecosystem are in ``peers_apart.py``.
"""

import json
import sys

from measure import first_line
from peers import make_trl_trainer, run_openrlhf_dpo
from turns import Gate, Recorder, Spec


def run_openrlhf(spec: Spec, gate: Gate) -> None:
    """OpenRLHF's own train_dpo."""
    from ours import common_flags

    recorder = Recorder()
    gate.replies["sequences"] = recorder.sequences

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
        gate.replies["sequences"] = without_recorder
        gate.start()

    flags = [
        *common_flags(spec),
        *("--train.batch_size", str(spec.batch_size // 2)),
        *("--train.micro_batch_size", str(spec.micro_batch_size // 2)),
        *("--data.dataset", f"{spec.folder}/openrlhf.jsonl", "--data.prompt_key", "prompt"),
        *("--ckpt.output_dir", f"{spec.folder}/openrlhf"),
    ]
    run_openrlhf_dpo(flags, lambda step, logs: gate.step_done(), on_start, spec.dtype)


def run_trl(spec: Spec, gate: Gate, method: str) -> None:
    """TRL's trainer, stopped by a callback."""
    from transformers import TrainerCallback

    class Rounds(TrainerCallback):
        """Waits where the loop begins and after every optimizer step."""

        def on_train_begin(self, *args, **kwargs):
            gate.start()

        def on_step_end(self, *args, **kwargs):
            gate.step_done()

    trainer = make_trl_trainer(spec, method, Rounds())
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

    gate.replies["sequences"] = without_hook
    trainer.train()


def main() -> None:
    """Run the arm that the command line describes until the parent says ``quit``."""
    spec = Spec(**json.loads(sys.argv[1]))
    gate = Gate(spec.steps_per_round, _import_everything)
    try:
        if spec.arm.startswith("pipa"):
            import ours

            ours.run(spec, gate)
        elif spec.arm == "openrlhf_dpo":
            run_openrlhf(spec, gate)
        else:
            run_trl(spec, gate, spec.arm.removeprefix("trl_"))
    except BaseException as error:
        gate.reply({"error": first_line(error)})
        raise


def _import_everything() -> None:
    """The same imports in every arm, before memory is looked at: an arm's figure is its models and activations."""
    import trl  # noqa: F401

    import pipa_openrlhf.training.run  # noqa: F401


if __name__ == "__main__":
    main()
