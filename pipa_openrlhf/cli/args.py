"""Every command-line flag of the package, once.

The flags of OpenRLHF's ``train_dpo`` are mirrored with their meaning and default, so that a working OpenRLHF script
runs here with only its module name changed. This file imports nothing heavy: a wrong flag is reported before torch
or a model is loaded.
"""

import argparse
import os
import sys
from datetime import datetime
from types import SimpleNamespace

from pipa_openrlhf.cli.renamed_flags import RENAMED
from pipa_openrlhf.errors import UserError

TRAINING_MODULES = ("train_pipa", "train_dpo", "train_kto", "train_sft")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        known = self._option_string_actions
        renamed = []
        for word in message.split():
            name = word.split("=")[0]
            new_name = RENAMED.get(name[2:]) if name.startswith("--") else None
            if f"--{new_name}" in known and name not in known:
                renamed.append(f"{name} of OpenRLHF 0.9 is called --{new_name} here")
        if renamed:
            raise UserError("; ".join(renamed))
        raise UserError(f"{message} (see --help)")


def _true_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _unescaped(text: str) -> str:
    # Bash hands "\\n" over as a backslash and an n.
    return text.replace("\\n", "\n").replace("\\t", "\t")


def build_parser(module: str) -> argparse.ArgumentParser:
    """Parser of one entry point; ``module`` is its name in ``pipa_openrlhf.cli``, such as ``"train_pipa"``."""
    parser = _Parser(
        prog=f"pipa_openrlhf.cli.{module}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for add_flags in FLAG_GROUPS[module]:
        add_flags(parser)
    return parser


def parse_args(module: str, argv: list[str] | None = None) -> SimpleNamespace:
    """Parse and nest: ``--data.max_len 64`` becomes ``args.data.max_len``.

    ``args.given`` is the set of dotted names that the user wrote; ``args.flat`` maps every dotted name to its value.

    Raises:
        UserError: an unknown, abbreviated or malformed flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    flat = vars(build_parser(module).parse_args(argv))
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    args = nest(flat)
    args.given = {"muon.nesterov" if name == "muon.no_nesterov" else name for name in given}
    args.flat = flat
    args.module = module
    return args


def nest(flat: dict) -> SimpleNamespace:
    """``{"a.b": 1, "c": 2}`` to ``SimpleNamespace(a=SimpleNamespace(b=1), c=2)``."""
    root = SimpleNamespace()
    for name, value in flat.items():
        node = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                setattr(node, parent, SimpleNamespace())
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return root


def default_prior_cache_dir() -> str:
    """One folder for all runs of a user, so that a learning-rate grid shares one prior pass."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "pipa_openrlhf", "prior")


def _model_flags(parser):
    add = parser.add_argument
    add("--model.model_name_or_path", type=str, default=None, help="hub name, folder, or adapter folder")
    add("--model.trust_remote_code", action="store_true", default=False, help="run code that comes with a model")
    add("--ds.param_dtype", type=str, default="bf16", choices=["bf16", "fp16", "fp32"], help="model data type")
    add(
        "--ds.attn_implementation",
        type=str,
        default="flash_attention_2",
        help="attention kernel; falls back to sdpa where flash-attn is absent",
    )
    add(
        "--ds.experts_implementation",
        type=str,
        default=None,
        choices=["eager", "batched_mm", "grouped_mm", "deepgemm"],
        help="MoE expert kernel passed to transformers",
    )
    add("--data.disable_fast_tokenizer", action="store_true", default=False, help="use the slow tokenizer")
    add("--use_ms", action="store_true", default=False, help="download from ModelScope")
    add("--train.seed", type=int, default=42, help="seed of shuffling, pairing, dropout and sampling")


def _upstream_training_flags(parser):
    """The flags that only training has, as OpenRLHF's train_dpo defines them."""
    add = parser.add_argument
    add("--ckpt.output_dir", type=str, default="./ckpt", help="where the model, metrics and card are written")
    add("--ckpt.save_steps", type=int, default=-1, help="checkpoint every K optimizer steps; -1: never")
    add("--ckpt.save_hf", action="store_true", default=False, help="also export the model at every checkpoint")
    add("--ckpt.disable_ds", action="store_true", default=False, help="no resumable checkpoints at save_steps")
    add("--ckpt.path", type=str, default=None, help="checkpoints; unset: <ckpt.output_dir>/checkpoints")
    add("--ckpt.max_num", type=int, default=3, help="checkpoints kept")
    add("--ckpt.max_mem", type=int, default=int(1e8), help="GB of checkpoints kept")
    add("--ckpt.load_enable", action="store_true", default=False, help="resume from the newest whole checkpoint")
    add("--logger.logging_steps", type=int, default=1, help="TensorBoard and wandb every K steps")
    add("--eval.steps", type=int, default=-1, help="evaluate every K optimizer steps; -1: once an epoch")
    add("--eval.dataset", type=str, default=None, help="evaluation data, as --data.dataset")
    add("--eval.split", type=str, default="test", help="split of --eval.dataset; a file's only split otherwise")

    add(
        "--train.micro_batch_size",
        type=int,
        default=8,
        help="one forward pass of a rank takes at most the tokens of that many longest sequences",
    )
    add("--train.batch_size", type=int, default=128, help="sequences of the global batch")
    add("--train.max_epochs", type=int, default=1, help="passes over the data")
    add("--train.full_determinism_enable", action="store_true", default=False, help="deterministic kernels")
    add("--data.dataloader_num_workers", type=int, default=0, help="worker processes that collate batches")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")

    add("--ds.zero_stage", type=int, default=2, help="DeepSpeed ZeRO stage, 0 to 3")
    add("--ds.use_universal_ckpt", action="store_true", default=False, help="accepted; checkpoints have our format")
    add("--ds.deepcompile", action="store_true", default=False, help="DeepSpeed's DeepCompile")
    add("--ds.zpg", type=int, default=1, help="ZeRO++ secondary partition size")
    add("--ds.adam_offload", action="store_true", default=False, help="keep the optimizer in CPU memory")
    add("--ds.use_liger_kernel", action="store_true", default=False, help="Liger kernels (CUDA)")
    add(
        "--ds.grad_accum_dtype",
        type=str,
        default=None,
        help="dtype of accumulated gradients; unset: fp32 where DeepSpeed can",
    )
    add("--ds.overlap_comm", action="store_true", default=False, help="overlap gradient reduction with backward")
    add("--ds.tensor_parallel_size", type=int, default=1, help="DeepSpeed tensor parallel size")
    add("--ds.ring_attn_size", type=int, default=1, help="ring attention group size")
    add("--ds.ring_attn_head_stride", type=int, default=1, help="heads per ring attention call")
    add("--ds.packing_samples", action="store_true", default=False, help="pack a micro-batch into one row")
    add("--ds.load_in_4bit", action="store_true", default=False, help="4-bit base weights (bitsandbytes, CUDA)")
    add("--ds.lora.rank", type=int, default=0, help="LoRA rank; 0: full fine-tuning")
    add("--ds.lora.alpha", type=int, default=16, help="LoRA alpha")
    add("--ds.lora.target_modules", type=str, nargs="*", default="all-linear", help="modules that get LoRA")
    add("--ds.lora.dropout", type=float, default=0, help="LoRA dropout")

    add("--model.gradient_checkpointing_enable", action="store_true", default=False, help="recompute activations")
    add("--model.gradient_checkpointing_reentrant", action="store_true", default=False, help="reentrant variant")
    add("--model.beta", type=float, default=0.1, help="DPO and KTO temperature; PIPA and SFT have none")
    add("--model.ipo_enable", action="store_true", default=False, help="IPO loss; no meaning for PIPA and SFT")
    add("--model.label_smoothing", type=float, default=0.0, help="conservative DPO; no meaning for PIPA and SFT")
    add("--model.aux_loss_coef", type=float, default=0, help="MoE balancing loss")
    add("--model.nll_loss_coef", type=float, default=0, help="NLL term of DPO; for PIPA see --pipa.sft_coef")
    add("--ref.model_name_or_path", type=str, default=None, help="same as --prior.model_name_or_path")
    add("--ref.offload", action="store_true", default=False, help="accepted; the prior is never resident")

    add("--optim", type=str, default="adam", choices=["adam", "muon"], help="optimizer")
    add("--muon.lr", type=float, default=0.02, help="learning rate of Muon's matrices")
    add("--muon.momentum", type=float, default=0.95, help="Muon momentum")
    add("--muon.ns_steps", type=int, default=5, help="fixed by DeepSpeed")
    add("--muon.nesterov", action="store_true", default=True, help="fixed by DeepSpeed")
    add("--muon.no_nesterov", dest="muon.nesterov", action="store_false", help="fixed by DeepSpeed")
    add("--adam.lr", type=float, default=1e-5, help="learning rate of the policy")
    add("--adam.betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW betas")
    add("--adam.eps", type=float, default=1e-8, help="AdamW epsilon")
    add("--adam.weight_decay", type=float, default=0.0, help="AdamW weight decay")
    add("--lr_scheduler", type=str, default="cosine_with_min_lr", help="scheduler name of transformers")
    add("--lr_warmup_ratio", type=float, default=0.03, help="warm-up share of all steps")
    add("--min_lr_ratio", type=float, default=0.1, help="final share of the learning rate")
    add("--max_norm", type=float, default=1.0, help="gradient clipping")

    add("--logger.wandb.key", type=str, default=None, help="wandb key; turns wandb on")
    add("--logger.wandb.org", type=str, default=None, help="wandb entity")
    add("--logger.wandb.group", type=str, default=None, help="wandb group")
    add("--logger.wandb.project", type=str, default="openrlhf_train_dpo", help="wandb project")
    add(
        "--logger.wandb.run_name",
        type=str,
        default=f"exp_{datetime.now().strftime('%m%dT%H:%M')}",
        help="run name in wandb and TensorBoard",
    )
    add("--logger.tensorboard_dir", type=str, default=None, help="TensorBoard folder")


def _template_flags(parser):
    add = parser.add_argument
    add("--data.input_template", type=str, default=None, help="format string around a text prompt, with one {}")
    add("--data.apply_chat_template", action="store_true", default=False, help="use the tokenizer's chat template")
    add(
        "--data.tokenizer_chat_template",
        type=str,
        default=None,
        help="chat template instead: a file or its text",
    )


def _data_flags(parser):
    _template_flags(parser)
    add = parser.add_argument
    add("--data.dataset", type=str, default=None, help="file, folder or hub name; several with commas")
    add("--data.dataset_probs", type=str, default=None, help="sampling probabilities of several data sets")
    add("--data.dataset_split", type=str, default="train", help="split")
    add("--data.max_samples", type=int, default=1000000, help="most rows read of a data set")
    add("--data.prompt_key", type=str, default=None, help="prompt column; unset: `prompt` where present")
    add("--data.chosen_key", type=str, default="chosen", help="column of the better answer")
    add("--data.rejected_key", type=str, default="rejected", help="column of the worse answer")
    add("--data.max_len", type=int, default=512, help="longest prompt + answer in tokens; longer ones are dropped")
    add(
        "--data.format",
        type=str,
        default="auto",
        choices=["auto", "unpaired", "paired", "stepwise", "alphamath"],
        help="columns of the data; auto: decided by their names",
    )
    add(
        "--data.annotation",
        type=str,
        default="answer",
        choices=["answer", "step"],
        help="label of a token: its answer's or its step's",
    )
    add(
        "--data.pairing",
        type=str,
        default="unpaired",
        choices=["unpaired", "given", "paired"],
        help="given: pairs of the data only; paired: match right and wrong answers of a problem too, drop the rest",
    )
    add("--data.step_threshold", type=float, default=0.5, help="Q at or above it makes a step of a wrong answer right")
    add("--data.step_separator", type=_unescaped, default="\n", help="text between steps; \\n and \\t are understood")
    add(
        "--data.mask_tool_output",
        type=_true_false,
        default=True,
        help="true|false: keep interpreter <output> text out of every loss (AlphaMath)",
    )


def _pipa_flags(parser):
    add = parser.add_argument
    add("--pipa.variant", type=str, default="m", choices=["m", "n"], help="prior on the marginal (m) or negative (n)")
    add(
        "--pipa.loss_reduction",
        type=str,
        default="sum",
        choices=["sum", "token_mean", "sequence_mean"],
        help="how token losses become the loss of a global batch",
    )
    add("--pipa.clip_eps", type=float, default=1e-10, help="PIPA-M: F of wrong tokens is clipped to 1 - eps")
    add("--pipa.fixed_value", type=float, default=None, help="use this g in place of the value head (Table 2: 0.5)")
    add("--pipa.sft_coef", type=float, default=0.0, help="weight of the NLL on right tokens (Table 4: 1.0)")
    add("--value.hidden_size", type=int, default=None, help="width of the value head; unset: the model's")
    add("--value.lr", type=float, default=None, help="learning rate of the value head; unset: the policy's")
    add("--value.init_from", type=str, default=None, help="folder of an exported value head to start from")


def _speed_flags(parser):
    add = parser.add_argument
    add(
        "--train.group_by_length",
        type=_true_false,
        default=True,
        help="true|false: batches of random prompts with all their answers, micro-batches of similar length; "
        "false: OpenRLHF's order and cut",
    )
    add(
        "--train.fused_head",
        type=_true_false,
        default=True,
        help="true|false: loss and gradient in one pass over the output head, for token-separable objectives",
    )
    add(
        "--train.share_prompts",
        type=_true_false,
        default=True,
        help="true|false: compute a prompt once for all its answers in a micro-batch",
    )
    add(
        "--model.self_check",
        type=_true_false,
        default=True,
        help="true|false: compare log-probs with the model's own forward pass at start-up, and use what is exact",
    )


def _objective_module_flag(parser):
    parser.add_argument(
        "--pipa.objective_module",
        type=str,
        default=None,
        help="Python file that defines `make_objective(settings)`; its objective replaces PIPA's",
    )


def _dpo_flags(parser):
    parser.set_defaults(**{"data.pairing": "given", "train.group_by_length": False})
    parser.add_argument(
        "--dpo.step_loss",
        type=str,
        default="l1",
        choices=["l1", "l0"],
        help="right steps of a rejected answer: l1 stops their gradient, l0 leaves them out (with step annotation)",
    )


def _kto_flags(parser):
    add = parser.add_argument
    add(
        "--kto.step_loss",
        type=str,
        default="l1",
        choices=["l1", "per_step"],
        help="l1: no gradient for right steps of a wrong answer; per_step: one term a step (with step annotation)",
    )
    add("--kto.desirable_weight", type=float, default=1.0, help="weight of right answers, lambda_D")
    add("--kto.undesirable_weight", type=float, default=1.0, help="weight of wrong answers, lambda_U")
    add("--kto.sft_coef", type=float, default=0.0, help="weight of the NLL on right tokens (Table 4: 1.0)")
    add("--data.input_key", type=str, default=None, help="prompt column, or whole conversation without output_key")
    add("--data.output_key", type=str, default=None, help="answer column of OpenRLHF 0.9's KTO data")
    add("--data.label_key", type=str, default="label", help="label column of OpenRLHF 0.9's KTO data")


def _prior_flags(parser):
    add = parser.add_argument
    add("--prior.model_name_or_path", type=str, default=None, help="prior; unset: the policy at step 0")
    add("--prior.cache_dir", type=str, default=default_prior_cache_dir(), help="log-probs of priors, shared by runs")


def _export_flags(parser):
    add = parser.add_argument
    add("--ckpt.merge_lora", action="store_true", default=False, help="export merged weights, not the adapter")
    add("--ckpt.overwrite", action="store_true", default=False, help="delete another run in --ckpt.output_dir first")
    add("--model.keep_dropout", action="store_true", default=False, help="keep the model's own dropout (not LoRA's)")


def _sft_flags(parser):
    parser.add_argument(
        "--data.keep",
        type=str,
        default="positive",
        choices=["positive", "negative", "all"],
        help="answers to train on; all and negative make the priors of Table 3",
    )


def _problem_flags(parser):
    _template_flags(parser)
    add = parser.add_argument
    add("--problems.file", type=str, default=None, help="JSONL with question or prompt, answer, optionally steps")
    add("--problems.max", type=int, default=None, help="most problems used, from the top; unset: all")


def _sample_flags(parser):
    add = parser.add_argument
    add("--sample.output", type=str, default=None, help="JSONL of labelled answers; continued if it exists")
    add("--sample.num_answers", type=int, default=4, help="answers a problem")
    add("--sample.temperature", type=float, default=0.7, help="sampling temperature; 0: greedy")
    add("--sample.top_p", type=float, default=1.0, help="nucleus sampling; 1: off")
    add("--sample.max_new_tokens", type=int, default=512, help="longest answer; a longer one is labelled wrong")
    add("--sample.batch_size", type=int, default=96, help="answers generated at a time")
    add(
        "--sample.label_steps",
        action="store_true",
        default=False,
        help="label every line of an answer against the problem's worked steps",
    )


def _evaluate_flags(parser):
    add = parser.add_argument
    add("--evaluate.output_dir", type=str, default=None, help="gets results.jsonl and summary.json")
    add("--evaluate.max_new_tokens", type=int, default=512, help="longest answer")
    add("--evaluate.batch_size", type=int, default=96, help="problems answered at a time")
    add("--evaluate.overwrite", action="store_true", default=False, help="delete another evaluation there first")


def _make_problems_flags(parser):
    add = parser.add_argument
    add("--problems.output_dir", type=str, default=None, help="gets one JSONL a split, and sft.jsonl")
    add("--problems.train", type=int, default=640, help="problems with worked answers for SFT")
    add("--problems.sample", type=int, default=800, help="problems to sample answers to")
    add("--problems.validation", type=int, default=200, help="problems to choose a learning rate on")
    add("--problems.test", type=int, default=600, help="held-out problems")
    add("--problems.max_steps", type=int, default=2, help="most equations in a worked answer")
    add("--problems.seed", type=int, default=0, help="another seed gives other problems of the same splits")


def _report_flags(parser):
    add = parser.add_argument
    add("--report.output", type=str, default="report.html", help="HTML file to write")
    add("--report.pictures", type=str, default=None, help="folder that gets each plot as an SVG file; unset: none")
    add("--report.title", type=str, default="Evaluation report", help="heading")
    add(
        "--report.evaluations",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="output folders of evaluate",
    )
    add(
        "--report.runs",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="output folders of training, with metrics.jsonl",
    )
    add("--report.baseline", type=str, default=None, help="what the others are compared with; unset: the first")
    add("--report.commands", type=str, default=None, help="text file with the commands that made the results")


FLAG_GROUPS = {
    "train_pipa": (
        _model_flags,
        _upstream_training_flags,
        _speed_flags,
        _data_flags,
        _pipa_flags,
        _objective_module_flag,
        _prior_flags,
        _export_flags,
    ),
    "train_dpo": (
        _model_flags,
        _upstream_training_flags,
        _speed_flags,
        _data_flags,
        _dpo_flags,
        _prior_flags,
        _export_flags,
    ),
    "train_kto": (
        _model_flags,
        _upstream_training_flags,
        _speed_flags,
        _data_flags,
        _kto_flags,
        _prior_flags,
        _export_flags,
    ),
    "train_sft": (_model_flags, _upstream_training_flags, _speed_flags, _data_flags, _sft_flags, _export_flags),
    "inspect_data": (_model_flags, _data_flags),
    "sample": (_model_flags, _problem_flags, _sample_flags),
    "evaluate": (_model_flags, _problem_flags, _evaluate_flags),
    "make_problems": (_make_problems_flags,),
    "report": (_report_flags,),
    "objectives": (),
}
