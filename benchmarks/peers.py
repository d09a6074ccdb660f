"""Run the trainers of others in this process, unchanged except for what keeps them off a CPU."""

import runpy
import sys
from collections.abc import Callable

from turns import Spec


def run_openrlhf_dpo(
    argv: list[str],
    on_step: Callable[[int, dict], None],
    on_start: Callable | None = None,
    param_dtype: str | None = None,
) -> None:
    """``openrlhf.cli.train_dpo`` with ``argv``.

    On CPU its strategy gets our replacements for its CUDA-only calls, and torch's fused AdamW, because DeepSpeed's own
    would be compiled there.

    Args:
        on_step: called with the number and the metrics of every optimizer step, in place of its logging.
        on_start: called with the DPOTrainer before its first step.
        param_dtype: "fp32", which its command line does not offer; None: the one in ``argv``.
    """
    from pipa_openrlhf.distributed import upstream  # noqa: F401
    from pipa_openrlhf.distributed.strategy import dtype_of, on_cpu

    # isort: split
    # Ours come first: they make OpenRLHF importable where flash-attn is absent.
    import openrlhf.trainer.dpo_trainer as dpo_trainer
    import openrlhf.utils
    import openrlhf.utils.utils

    if on_cpu():
        _replace_cuda_calls()
    get_strategy = openrlhf.utils.get_strategy

    def get_strategy_of_dtype(args):
        args.ds.param_dtype = param_dtype or args.ds.param_dtype
        return get_strategy(args)

    openrlhf.utils.get_strategy = get_strategy_of_dtype
    openrlhf.utils.utils.convert_to_torch_dtype = dtype_of

    trainer_class = dpo_trainer.DPOTrainer
    fit = trainer_class.fit

    def fit_after_start(self, *args, **kwargs):
        if on_start is not None:
            on_start(self)
        return fit(self, *args, **kwargs)

    def report(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        on_step(global_step, logs_dict)

    trainer_class.fit = fit_after_start
    trainer_class.save_logs_and_checkpoints = report
    sys.argv = ["train_dpo", *argv]
    runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")


def _replace_cuda_calls() -> None:
    import openrlhf.utils
    import openrlhf.utils.deepspeed.deepspeed as deepspeed_module

    from pipa_openrlhf.distributed import upstream
    from pipa_openrlhf.distributed.strategy import Strategy

    class CpuStrategy(upstream.DeepspeedStrategy):
        """Upstream's strategy; only what names CUDA is replaced."""

        def setup_distributed(self, *args, **kwargs):
            Strategy.setup_distributed(self, *args, **kwargs)
            self.accumulated_gradient = self.train_batch_size // self.micro_train_batch_size // self.world_size

        def get_ds_train_config(self, optim_dict=None, *, max_norm=None):
            if optim_dict is not None:
                optim_dict["params"].update(torch_adam=True, fused=True)
            return super().get_ds_train_config(optim_dict, max_norm=max_norm)

        def all_reduce(self, data, op="mean"):
            return data  # one rank

    def get_strategy(args):
        return CpuStrategy(
            seed=args.train.seed,
            max_norm=args.max_norm,
            micro_train_batch_size=args.train.micro_batch_size,
            train_batch_size=args.train.batch_size,
            zero_stage=args.ds.zero_stage,
            args=args,
        )

    openrlhf.utils.get_strategy = get_strategy
    deepspeed_module.torch_dist_barrier_and_cuda_sync = lambda: None


def make_trl_trainer(spec: Spec, method: str, callback):
    """TRL's DPOTrainer or KTOTrainer, LoRA, at the best settings that run.

    Args:
        method: "dpo" or "kto".
    """
    import datasets
    import torch
    import trl.trainer.utils
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from pipa_openrlhf.distributed.strategy import dtype_of

    # Its head skips prompt positions where this says True, which is on CUDA only; other kernels ask elsewhere.
    trl.trainer.utils._use_triton = lambda device: True
    is_dpo = method == "dpo"
    config_class, trainer_class = (DPOConfig, DPOTrainer) if is_dpo else (KTOConfig, KTOTrainer)
    # The unit of a DPO batch is a pair.
    per_forward = spec.micro_batch_size // (2 if is_dpo else 1)
    options = {}
    if is_dpo:
        # Unused columns would be removed before the sampler looks for this one.
        options = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    config = config_class(
        output_dir=f"{spec.folder}/trl",
        per_device_train_batch_size=per_forward,
        gradient_accumulation_steps=spec.batch_size // spec.micro_batch_size,
        max_length=spec.max_length,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=spec.epochs,
        gradient_checkpointing=spec.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=spec.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = datasets.load_dataset(
        "json", data_files=f"{spec.folder}/{'pairs' if is_dpo else 'answers'}.jsonl", split="train"
    )
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    if options:
        data = data.map(lambda row: {"length": _pair_length(row, tokenizer)})
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype_of(spec.dtype), attn_implementation="sdpa")
    return trainer_class(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec.rank, lora_alpha=spec.rank, target_modules="all-linear", lora_dropout=0.0
        ),
    )


def _pair_length(row: dict, tokenizer) -> int:
    return max(len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected"))
