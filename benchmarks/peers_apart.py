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
from itertools import pairwise
from pathlib import Path

import torch
from inputs import CHARACTERS, EOS, sequence_key
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
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = _flash_attn_varlen_func
    sys.modules["flash_attn"] = module
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
