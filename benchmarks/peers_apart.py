"""Arms of ``train_step.py`` that need other versions than ours, in a process of another environment's Python.

    python3.11 -m venv FOLDER/swift && FOLDER/swift/bin/pip install torch==2.13.0
    FOLDER/swift/bin/pip install ms-swift==4.6.0
    export SWIFT_PYTHON=FOLDER/swift/bin/python

    python3.11 -m venv FOLDER/flash && FOLDER/flash/bin/pip install torch==2.13.0
    FOLDER/flash/bin/pip install flash-pref==0.1.1 trl==0.17.0 transformers==4.51.3 peft==0.15.2 accelerate==1.7.0 \\
        datasets==3.6.0
    export FLASH_PREF_PYTHON=FOLDER/flash/bin/python

Where PyPI offers only CUDA builds of torch, give its pip the index of CPU wheels. Both packages want flash attention,
which there is not on CPU: they get torch's sdpa, sequence by sequence, so that neither padding nor other sequences are
attended to. Nothing else of their training step is replaced.
"""

import json
import sys
import types
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from inputs import EOS
from measure import first_line
from torch.nn.functional import scaled_dot_product_attention
from turns import Gate, Recorder, Spec


def attend(query, key, value, query_ends: list[int], key_ends: list[int], scale: float | None) -> torch.Tensor:
    """Causal attention within sequences; the last query of a sequence sees all of its keys.

    Args:
        query, key, value: [heads, tokens, head size], sequences one after another.
        query_ends, key_ends: 0, then the end of every sequence.
    """
    parts = []
    for (start, end), (key_start, key_end) in zip(pairwise(query_ends), pairwise(key_ends)):
        size, key_size = end - start, key_end - key_start
        if not size:
            continue  # the same answer as its partner
        mask = None
        if size < key_size:
            mask = torch.ones(size, key_size, dtype=torch.bool).tril(key_size - size)
        parts.append(
            scaled_dot_product_attention(
                query[None, :, start:end],
                key[None, :, key_start:key_end],
                value[None, :, key_start:key_end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
        )
    return torch.cat(parts, dim=1)


def make_rounds(gate: Gate):
    """A callback of transformers' Trainer: a round is an epoch."""
    from transformers import TrainerCallback

    class Rounds(TrainerCallback):
        """Waits where the loop begins and at the end of every pass over the data."""

        def on_train_begin(self, *args, **kwargs):
            gate.start()

        def on_epoch_end(self, *args, **kwargs):
            gate.step_done()

    return Rounds()


def run_flash_pref(spec: Spec, gate: Gate) -> None:
    """``flash_pref.FlashDPOTrainer``: TRL's DPO, where what a pair has in common is computed once."""
    import datasets
    from flash_pref import FlashDPOTrainer, shared_prefix
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, modeling_flash_attention_utils
    from trl import DPOConfig

    # flash-pref replaces their attention too; they look for the package, and have none without it.
    for name in ("qwen2_vl", "qwen2_5_vl"):
        import_module(f"transformers.models.{name}.modeling_{name}")._flash_attention_forward = None
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = _flash_attn_varlen_func
    sys.modules["flash_attn"] = module
    modeling_flash_attention_utils._flash_supports_window_size = False
    sys.modules[shared_prefix.__module__].torch = _TorchOnCpu()

    model = LlamaForCausalLM.from_pretrained(spec.model, attn_implementation="sdpa", torch_dtype=_dtype(spec))
    # Loading it so would ask for the package.
    model.config._attn_implementation = "flash_attention_2"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{spec.model}/tokenizer.json", eos_token=EOS, pad_token=EOS)
    config = DPOConfig(
        output_dir=f"{spec.folder}/flash_pref",
        per_device_train_batch_size=spec.micro_batch_size // 2,
        gradient_accumulation_steps=spec.batch_size // spec.micro_batch_size,
        max_length=spec.max_length,
        max_prompt_length=spec.max_length,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=spec.epochs,
        gradient_checkpointing=spec.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_logits_to_keep=True,
        group_by_length=True,
        remove_unused_columns=False,
        bf16=spec.dtype == "bf16",
        use_cpu=True,
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = datasets.load_dataset("json", data_files=f"{spec.folder}/pairs.jsonl", split="train")
    # A token is a character.
    data = data.map(lambda row: {"length": len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))})
    trainer = FlashDPOTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[make_rounds(gate)],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec.rank, lora_alpha=spec.rank, target_modules="all-linear", lora_dropout=0.0
        ),
    )
    recorder = Recorder()
    forward = trainer.concatenated_forward

    def forward_and_record(model, batch):
        output = forward(model, batch)
        for side in ("chosen", "rejected"):
            for row, log_prob in enumerate(output[f"{side}_logps"].detach()):
                prompt, answer = (
                    batch[f"{part}_input_ids"][row][batch[f"{part}_attention_mask"][row].bool()].tolist()
                    for part in ("prompt", side)
                )
                recorder.add(prompt + answer, len(prompt), log_prob)
        return output

    def sequences() -> dict:
        trainer.concatenated_forward = forward
        return recorder.sequences()

    trainer.concatenated_forward = forward_and_record
    gate.replies["sequences"] = sequences
    trainer.train()


def _flash_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=True, **_):
    """flash-attn's, of [tokens, heads, head size]."""
    heads_first = (one.transpose(0, 1) for one in (query, key, value))
    return attend(*heads_first, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale).transpose(0, 1)


def run_swift(spec: Spec, gate: Gate) -> None:
    """ms-swift's ``rlhf`` with packing, KTO or DPO."""
    from swift.arguments import RLHFArguments
    from swift.pipelines.train.rlhf import SwiftRLHF
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("by_sequence", _attend_packed)
    AttentionMaskInterface.register("by_sequence", lambda *args, **kwargs: None)
    # It asks for flash attention by name.
    RLHFArguments._check_padding_free = lambda self: setattr(self, "padding_free", self.packing)
    method = spec.arm.removeprefix("swift_")
    recorder = Recorder()

    class Stopped(SwiftRLHF):
        """The pipeline, whose trainer is told to stop after every round."""

        def train(self, trainer):
            trainer.add_callback(make_rounds(gate))
            name = "forward" if method == "kto" else "concatenated_forward"
            forward = getattr(trainer, name)

            def forward_and_record(model, batch, **options):
                held = _sequences_of(batch, "completion_" if method == "kto" else "")
                output = forward(model, batch, **options)
                if not options.get("is_ref_model"):
                    for (ids, prompt), log_prob in zip(held, _log_probs(output, batch), strict=True):
                        recorder.add(ids, prompt, log_prob)
                return output

            def sequences() -> dict:
                setattr(trainer, name, forward)
                return recorder.sequences()

            setattr(trainer, name, forward_and_record)
            gate.replies["sequences"] = sequences
            return super().train(trainer)

    Stopped(_swift_flags(spec, method)).main()


def _swift_flags(spec: Spec, method: str) -> list[str]:
    per_pack = spec.micro_batch_size // (1 if method == "kto" else 2)
    flags = {
        "rlhf_type": method,
        "model": spec.model,
        "model_type": "llama",
        "template": "dummy",
        "use_chat_template": "false",
        "dataset": _swift_data(spec, method),
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "packing": "true",
        "packing_length": per_pack * spec.max_length,
        "attn_impl": "by_sequence",
        "tuner_type": "lora",
        "lora_rank": spec.rank,
        "lora_alpha": spec.rank,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "torch_dtype": "bfloat16" if spec.dtype == "bf16" else "float32",
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": max(2, spec.batch_size // spec.micro_batch_size),
        "max_length": spec.max_length,
        "gradient_checkpointing": "true" if spec.checkpointing else "false",
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "output_dir": f"{spec.folder}/{spec.arm}",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _swift_data(spec: Spec, method: str) -> str:
    """The data in its layout."""
    rows = []
    source = Path(spec.folder, "answers.jsonl" if method == "kto" else "pairs.jsonl")
    for row in map(json.loads, source.read_text().splitlines()):
        answer = row["completion"] if method == "kto" else row["chosen"]
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
        more = {"label": row["label"]} if method == "kto" else {"rejected_response": row["rejected"]}
        rows.append({"messages": turns, **more})
    path = Path(spec.folder, f"{spec.arm}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _attend_packed(module, query, key, value, attention_mask, scaling=None, position_ids=None, **_):
    """An attention function of transformers' interface, of [1, heads, tokens, head size]."""
    ends = [*torch.nonzero(position_ids.flatten() == 0).flatten().tolist(), query.shape[2]]
    return attend(query[0], key[0], value[0], ends, ends, scaling).transpose(0, 1)[None], None


def _sequences_of(batch: dict, prefix: str) -> list[tuple[list[int], int]]:
    """Token ids and prompt length of the sequences of a packed batch."""
    ids, labels = (batch[f"{prefix}{name}"][0].tolist() for name in ("input_ids", "labels"))
    position_ids = batch[f"{prefix}position_ids"].flatten()
    ends = [*torch.nonzero(position_ids == 0).flatten().tolist(), len(ids)]
    return [
        (ids[start:end], next(place for place, label in enumerate(labels[start:end]) if label != -100))
        for start, end in pairwise(ends)
    ]


def _log_probs(output, batch: dict) -> list[float]:
    """Of the sequences of a packed batch, in their order."""
    if isinstance(output, dict):
        return [*output["chosen_logps"].tolist(), *output["rejected_logps"].tolist()]
    chosen, rejected = (iter(part.tolist()) for part in output[:2])
    return [next(chosen if label else rejected) for label in batch["label"]]


class _TorchOnCpu:
    """torch for a module that makes tensors on CUDA."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def tensor(self, values, device=None):
        """On CPU."""
        return torch.tensor(values)


def _dtype(spec: Spec) -> torch.dtype:
    return torch.bfloat16 if spec.dtype == "bf16" else torch.float32


def main() -> None:
    """Run the arm that the command line describes until the parent says ``quit``."""
    spec = Spec(**json.loads(sys.argv[1]))
    run, package = (run_flash_pref, "flash_pref") if spec.arm == "flash_pref" else (run_swift, "swift")
    gate = Gate(1, lambda: __import__(package))
    try:
        run(spec, gate)
    except BaseException as error:
        gate.reply({"error": first_line(error)})
        raise


if __name__ == "__main__":
    main()
