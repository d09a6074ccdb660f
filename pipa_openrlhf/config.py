"""Every setting of the package, once: name, type, default, help, bounds and part in a run's identity.

The flags of OpenRLHF's ``train_dpo`` have their names, meanings and defaults here, so that a working OpenRLHF script
runs with only its module name changed. An objective's own settings stand beside its loss, in ``objectives/``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.errors import UserError, check_downloads, check_model_path, is_adapter, need_package
from pipa_openrlhf.objectives.objective import ObjectiveConfig
from pipa_openrlhf.objectives.pipa import PipaConfig
from pipa_openrlhf.remembered import user_cache_dir
from pipa_openrlhf.settings import by_content, check_bounds, free, setting

# The schedulers of transformers that need no more than the number of steps.
SCHEDULERS = (
    *("constant", "constant_with_warmup", "cosine", "cosine_warmup_with_min_lr", "cosine_with_min_lr"),
    *("cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"),
)
MODEL_FLAG = "--model.model_name_or_path"


@dataclass(frozen=True)
class ModelSource:
    """Which model, for every command that loads one."""

    model_name_or_path: str | None = by_content(None, "hub name, folder, or adapter folder", is_path=True)
    trust_remote_code: bool = free(False, "run code that comes with a model")

    @property
    def path(self) -> str:
        """The model's hub name or folder.

        Raises:
            UserError: none is given.
        """
        if not self.model_name_or_path:
            raise UserError(f"{MODEL_FLAG} is missing: give a hub name, a folder or an adapter folder")
        return self.model_name_or_path


@dataclass(frozen=True)
class ModelConfig(ModelSource):
    """The policy. ``beta``, ``ipo_enable``, ``label_smoothing`` and ``nll_loss_coef`` stand here as in OpenRLHF."""

    gradient_checkpointing_enable: bool = free(False, "recompute activations")
    gradient_checkpointing_reentrant: bool = free(False, "reentrant variant")
    beta: float = setting(0.1, "DPO and KTO temperature; PIPA and SFT have none")
    ipo_enable: bool = setting(False, "IPO loss; no meaning for PIPA and SFT")
    label_smoothing: float = setting(0.0, "conservative DPO; no meaning for PIPA and SFT")
    aux_loss_coef: float = setting(0, "MoE balancing loss", least=0)
    nll_loss_coef: float = setting(0, "NLL term of DPO; for PIPA see --pipa.sft_coef", least=0)
    self_check: bool = free(
        True, "true|false: compare log-probs with the model's own forward pass at start-up, and use what is exact"
    )
    keep_dropout: bool = setting(False, "keep the model's own dropout (not LoRA's)")


@dataclass(frozen=True)
class PriorConfig:
    """The frozen model that the policy is compared with."""

    model_name_or_path: str | None = by_content(None, "prior; unset: the policy at step 0", is_path=True)
    cache_dir: str = free(partial(user_cache_dir, "prior"), "log-probs of priors, shared by runs", is_written=True)


@dataclass(frozen=True)
class RefConfig:
    """OpenRLHF's names for the prior."""

    model_name_or_path: str | None = by_content(None, "same as --prior.model_name_or_path", is_path=True)
    offload: bool = free(False, "accepted; the prior is never resident")


@dataclass(frozen=True)
class ValueConfig:
    """The value head."""

    hidden_size: int | None = setting(None, "width of the value head; unset: the model's", least=1)
    lr: float | None = setting(None, "learning rate of the value head; unset: the policy's", least=0)
    init_from: str | None = by_content(None, "folder of an exported value head to start from", is_path=True)


@dataclass(frozen=True)
class SeedConfig:
    """For every command with chance in it."""

    seed: int = setting(42, "seed of shuffling, pairing, dropout and sampling")


@dataclass(frozen=True)
class TrainConfig(SeedConfig):
    """Batches and passes."""

    micro_batch_size: int = free(
        8,
        "one forward pass of a rank takes at most the tokens of that many longest sequences; without effect where "
        "--train.max_tokens_per_micro_batch is given, which sets no ceiling on their number",
        least=1,
    )
    max_tokens_per_micro_batch: int | None = free(
        None,
        "one forward pass of a rank takes at most that many tokens, those of padding included and shared ones once; a "
        "longer sequence (or pair) is alone; unset: --train.micro_batch_size times the longest",
        least=1,
    )
    batch_size: int = setting(128, "sequences of the global batch", least=1)
    # More epochs go on, fewer are refused: see `training/identity.py`.
    max_epochs: int = free(1, "passes over the data", least=1)
    max_bad_steps: int = free(
        10,
        "most steps left out because their loss or gradient is NaN or infinite; one more ends the run",
        least=0,
    )
    full_determinism_enable: bool = free(False, "deterministic kernels")
    group_by_length: bool | None = setting(
        None,
        "true|false: batches of random prompts with all their answers, micro-batches of similar length; false: "
        "OpenRLHF's order and cut; unset: false for objectives on pairs, true for the others",
    )
    fused_head: bool = free(
        True, "true|false: loss and gradient in one pass over the output head, for token-separable objectives"
    )
    share_prefixes: bool = free(
        True,
        "true|false: compute every token that sequences of a micro-batch have in common at their beginnings once; one "
        "mask of LoRA dropout serves them all",
        former="train.share_prompts",
    )


@dataclass(frozen=True)
class NumericsConfig:
    """Data type and kernels."""

    param_dtype: str = setting("bf16", "model data type", choices=("bf16", "fp16", "fp32"))
    attn_implementation: str = free(
        "flash_attention_2", "attention kernel; falls back to sdpa where flash-attn is absent"
    )
    experts_implementation: str | None = free(
        None, "MoE expert kernel passed to transformers", choices=("eager", "batched_mm", "grouped_mm", "deepgemm")
    )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA."""

    rank: int = setting(0, "LoRA rank; 0: full fine-tuning", least=0)
    alpha: int = setting(16, "LoRA alpha")
    target_modules: str | Sequence[str] = setting("all-linear", "modules that get LoRA", nargs="*")
    dropout: float = setting(0, "LoRA dropout", least=0, below=1)


@dataclass(frozen=True)
class DeepSpeedConfig(NumericsConfig):
    """DeepSpeed, and what else decides where things are computed."""

    zero_stage: int = free(2, "DeepSpeed ZeRO stage, 0 to 3", least=0, most=3)
    use_universal_ckpt: bool = free(False, "accepted; checkpoints have our format")
    deepcompile: bool = free(False, "DeepSpeed's DeepCompile")
    zpg: int = free(1, "ZeRO++ secondary partition size")
    adam_offload: bool = free(False, "keep the optimizer in CPU memory")
    use_liger_kernel: bool = free(False, "Liger kernels (CUDA)")
    grad_accum_dtype: str | None = setting(None, "dtype of accumulated gradients; unset: fp32 where DeepSpeed can")
    overlap_comm: bool = free(False, "overlap gradient reduction with backward")
    tensor_parallel_size: int = free(1, "DeepSpeed tensor parallel size")
    ring_attn_size: int = free(1, "ring attention group size")
    ring_attn_head_stride: int = free(1, "heads per ring attention call")
    packing_samples: bool = free(False, "pack a micro-batch into one row")
    load_in_4bit: bool = setting(False, "4-bit base weights (bitsandbytes, CUDA)")
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self) -> None:
        """Raises UserError."""
        if self.lora.rank > 0 and self.lora.alpha < 1:
            raise UserError(f"--ds.lora.alpha must be at least 1, got {self.lora.alpha}")
        if self.ring_attn_size > 1:
            raise UserError("--ds.ring_attn_size above 1 is not supported: use ZeRO-3 and gradient checkpointing")
        if self.tensor_parallel_size > 1:
            raise UserError("--ds.tensor_parallel_size above 1 is not supported: use --ds.zero_stage 3")
        if self.load_in_4bit:
            need_package("ds.load_in_4bit", "bitsandbytes")
            if self.param_dtype != "bf16":
                raise UserError("--ds.load_in_4bit needs --ds.param_dtype bf16")
            if not self.lora.rank:
                raise UserError("--ds.load_in_4bit needs LoRA: give --ds.lora.rank")
            if self.zero_stage == 3:
                raise UserError("--ds.load_in_4bit needs --ds.zero_stage 2 or lower")
        if self.grad_accum_dtype == "fp32" and self.param_dtype == "bf16" and self.zero_stage == 0:
            raise UserError("--ds.grad_accum_dtype fp32 with bf16 weights needs --ds.zero_stage 1 or higher")
        if (
            self.grad_accum_dtype == "fp32"
            and self.param_dtype == "bf16"
            and self.adam_offload
            and self.zero_stage < 3
        ):
            # DeepSpeed 0.19.6 loses the gradient at ZeRO-1, and adds it up in bf16 at ZeRO-2.
            raise UserError(
                "--ds.grad_accum_dtype fp32 with --ds.adam_offload and bf16 weights needs --ds.zero_stage 3"
            )
        if self.use_liger_kernel:
            need_package("ds.use_liger_kernel", "liger_kernel")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written, where and how often."""

    output_dir: str = free("./ckpt", "where the model, metrics and card are written", is_written=True)
    save_steps: int = free(-1, "checkpoint every K optimizer steps; -1: never")
    save_hf: bool = free(False, "also export the model at every checkpoint")
    disable_ds: bool = free(False, "no resumable checkpoints at save_steps")
    path: str | None = free(None, "checkpoints; unset: <ckpt.output_dir>/checkpoints", is_written=True)
    max_num: int = free(3, "checkpoints kept", least=1)
    max_mem: int = free(int(1e8), "GB of checkpoints kept")
    load_enable: bool = free(False, "resume from the newest whole checkpoint")
    merge_lora: bool = setting(False, "export merged weights, not the adapter")
    value_model: bool = setting(
        False, "also export <folder>/value_model: the merged model with its value head, as vLLM serves reward models"
    )
    overwrite: bool = free(False, "delete another run in --ckpt.output_dir first")

    def check(self) -> None:
        """Raises UserError."""
        if self.save_steps != -1 and self.save_steps < 1:
            raise UserError(f"--ckpt.save_steps must be -1 or at least 1, got {self.save_steps}")
        if self.overwrite and self.load_enable:
            raise UserError("--ckpt.overwrite deletes the run that --ckpt.load_enable would resume: give one of them")

    @property
    def folder(self) -> str:
        """Where checkpoints are."""
        return self.path or os.path.join(self.output_dir, "checkpoints")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training."""

    steps: int = free(-1, "evaluate every K optimizer steps; -1: once an epoch")
    dataset: str | None = free(None, "evaluation data, as --data.dataset", is_path=True)
    split: str = free("test", "split of --eval.dataset; a file's only split otherwise")

    def check(self) -> None:
        """Raises UserError."""
        if self.steps != -1 and self.steps < 1:
            raise UserError(f"--eval.steps must be -1 or at least 1, got {self.steps}")


@dataclass(frozen=True)
class WandbConfig:
    """wandb."""

    key: str | None = free(None, "wandb key; turns wandb on")
    org: str | None = free(None, "wandb entity")
    group: str | None = free(None, "wandb group")
    project: str = free("openrlhf_train_dpo", "wandb project")
    run_name: str = free(lambda: f"exp_{datetime.now().strftime('%m%dT%H:%M')}", "run name in wandb and TensorBoard")


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go, beside ``metrics.jsonl``."""

    logging_steps: int = free(1, "TensorBoard and wandb every K steps", least=1)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard_dir: str | None = free(None, "TensorBoard folder", is_written=True)


@dataclass(frozen=True)
class AdamConfig:
    """AdamW."""

    lr: float = setting(1e-5, "learning rate of the policy", least=0)
    betas: Sequence[float] = setting((0.9, 0.95), "AdamW betas", nargs=2, least=0, below=1)
    eps: float = setting(1e-8, "AdamW epsilon", least=0)
    weight_decay: float = setting(0.0, "AdamW weight decay", least=0)


@dataclass(frozen=True)
class MuonConfig:
    """Muon."""

    lr: float = setting(0.02, "learning rate of Muon's matrices")
    momentum: float = setting(0.95, "Muon momentum")
    ns_steps: int = setting(5, "fixed by DeepSpeed")
    nesterov: bool = setting(True, "fixed by DeepSpeed", negation="no_nesterov")


@dataclass(frozen=True)
class RunConfig:
    """One training run. ``objective`` is the settings of one of the objectives in ``objectives/table.py``."""

    objective: ObjectiveConfig = field(default_factory=PipaConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ds: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    ckpt: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    optim: str = setting("adam", "optimizer", choices=("adam", "muon"))
    lr_scheduler: str = setting("cosine_with_min_lr", "scheduler name of transformers")
    lr_warmup_ratio: float = setting(0.03, "warm-up share of all steps", least=0, most=1)
    min_lr_ratio: float = setting(0.1, "final share of the learning rate", least=0, most=1)
    max_norm: float = setting(1.0, "gradient clipping", least=0)
    use_ms: bool = free(False, "download from ModelScope")
    local_rank: int = free(-1, "set by the deepspeed launcher")

    @property
    def prior_path(self) -> str | None:
        """A prior other than the policy at step 0; None: that one."""
        return self.prior.model_name_or_path or self.ref.model_name_or_path

    def check(self) -> None:
        """Refuse what cannot work, before anything heavy is imported or loaded.

        Raises:
            UserError: one line naming the flag and the way out.
        """
        check_bounds(self)
        if self.lr_scheduler not in SCHEDULERS:
            raise UserError(f"--lr_scheduler {self.lr_scheduler} is not one of {', '.join(SCHEDULERS)}")
        for group in (self.ckpt, self.ds, self.eval):
            group.check()
        if self.ckpt.merge_lora and not self.ds.lora.rank:
            raise UserError("--ckpt.merge_lora needs LoRA: give --ds.lora.rank, or leave it out for full fine-tuning")
        self._check_models()
        self.data.check()
        check_downloads(self.use_ms)
        self.objective.check(self)
        if self.optim == "muon":
            if self.value.lr is not None:
                raise UserError("--value.lr needs --optim adam: Muon takes one list of parameters")
            if self.ckpt.save_steps != -1 and not self.ckpt.disable_ds:
                raise UserError(
                    "--optim muon cannot be checkpointed: leave out --ckpt.save_steps, or give --ckpt.disable_ds"
                )

    def _check_models(self) -> None:
        check_model_path(self.model.path, MODEL_FLAG)
        self._check_adapter(self.model.path)
        if "prior" in self.objective.hidden_groups:
            return
        ref, prior = self.ref.model_name_or_path, self.prior.model_name_or_path
        if ref and prior not in (None, ref):
            raise UserError("--ref.model_name_or_path and --prior.model_name_or_path name two priors: give one")
        if self.prior_path:
            check_model_path(self.prior_path, "--prior.model_name_or_path")
            self._check_adapter(self.prior_path)

    def _check_adapter(self, path: str) -> None:
        for name in ("load_in_4bit", "use_liger_kernel"):
            if getattr(self.ds, name) and is_adapter(path):
                raise UserError(
                    f"--ds.{name} cannot be used with the adapter {path}, which is merged into its base: save the "
                    "merged model (docs/adapters.md) and start from that"
                )
