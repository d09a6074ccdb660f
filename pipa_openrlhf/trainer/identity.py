"""What decides the result of a run: one record with one digest, kept with its checkpoints and with the finished run.

Every flag decides unless ``MAY_CHANGE`` names it, so that a flag which is added decides until it is listed there.
Paths count by what lies behind them: a model that was moved is the same model, data that was edited are other data.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from types import SimpleNamespace

from pipa_openrlhf.cli.args import default_prior_cache_dir
from pipa_openrlhf.losses.objectives import Objective
from pipa_openrlhf.models.identity import NUMERICS_VERSION, file_sha256, weights_id
from pipa_openrlhf.models.value_head import CONFIG_FILE, WEIGHTS_FILE

# Raised when the same settings lead to another result: another order of batches, another loss.
RUN_VERSION = 1

# What a resumed run may have differently: it computes the same with it, or only looks on.
MAY_CHANGE = frozenset(
    (
        # More epochs go on, fewer are refused: see `difference`.
        "train.max_epochs",
        # Where things are kept, and how often.
        *("ckpt.output_dir", "ckpt.path", "ckpt.save_steps", "ckpt.save_hf", "ckpt.disable_ds", "ckpt.max_num"),
        *("ckpt.max_mem", "ckpt.load_enable", "ckpt.overwrite", "prior.cache_dir", "use_ms"),
        "model.trust_remote_code",
        # Looking on.
        *("logger.logging_steps", "logger.tensorboard_dir", "logger.wandb.key", "logger.wandb.org"),
        *("logger.wandb.group", "logger.wandb.project", "logger.wandb.run_name"),
        *("eval.dataset", "eval.split", "eval.steps"),
        # Speed and memory.
        *("train.micro_batch_size", "train.fused_head", "train.share_prompts", "train.full_determinism_enable"),
        *("data.dataloader_num_workers", "model.gradient_checkpointing_enable"),
        *("model.gradient_checkpointing_reentrant", "ref.offload", "local_rank", "ds.attn_implementation"),
        *("ds.experts_implementation", "ds.zero_stage", "ds.use_universal_ckpt", "ds.deepcompile", "ds.zpg"),
        *("ds.adam_offload", "ds.use_liger_kernel", "ds.overlap_comm", "ds.tensor_parallel_size"),
        *("ds.ring_attn_size", "ds.ring_attn_head_stride", "ds.packing_samples"),
        "model.self_check",
    )
)
_MODEL, _PRIOR = "model.model_name_or_path", "prior.model_name_or_path"
_HEAD, _OBJECTIVE, _DATA = "value.init_from", "pipa.objective_module", "data.dataset"
# `ref` is another name of `prior`.
_BY_CONTENT = frozenset({_MODEL, _PRIOR, "ref.model_name_or_path", _HEAD, _OBJECTIVE})


@dataclass(frozen=True)
class RunIdentity:
    """JSON-ready.

    Attributes:
        settings: what decides by its value, by the name of a flag.
        contents: digests of what decides by content, by the name of the flag that leads to it.
        shown: values of the flags behind ``contents``; they are compared only to say what differs.
        max_epochs: may grow.
        started: ISO time at which chat templates of the run believe to be.
    """

    settings: dict[str, object]
    contents: dict[str, str]
    shown: dict[str, object]
    max_epochs: int
    started: str

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides; paths, epochs and the time do not."""
        return hashlib.sha256(json.dumps([self.settings, self.contents], sort_keys=True).encode()).hexdigest()

    def with_data(self, fingerprint: str) -> "RunIdentity":
        """The same with what the data flags led to."""
        return replace(self, contents={**self.contents, f"--{_DATA}": fingerprint})

    def record(self) -> dict:
        """As it is kept in ``state.json`` and ``args.json``."""
        return {"digest": self.digest, **asdict(self)}


def is_by_content(name: str) -> bool:
    """Whether a flag decides by what it leads to, whatever its value."""
    return name in _BY_CONTENT or (name.startswith("data.") and name not in MAY_CHANGE)


def identify(args: SimpleNamespace, objective: Objective, started: str | None = None) -> RunIdentity:
    """Identity of the run that checked flags describe, as far as it is known before the data are read.

    Args:
        args: nested flags.
        started: of the run that is resumed; None: now.

    Raises:
        UserError: a model folder holds no weights.
    """
    prior = args.prior.model_name_or_path if objective.needs_prior else None
    values = {name: _plain(value) for name, value in {**args.flat, _PRIOR: prior}.items()}
    settings = {
        f"--{name}": value for name, value in values.items() if name not in MAY_CHANGE and not is_by_content(name)
    }
    settings["module"] = args.module
    settings["version of the computation"] = f"{RUN_VERSION}.{NUMERICS_VERSION}"
    return RunIdentity(
        settings=settings,
        contents=_contents(args, objective),
        shown={f"--{name}": value for name, value in values.items() if is_by_content(name)},
        max_epochs=args.train.max_epochs,
        started=started or datetime.now().isoformat(timespec="seconds"),
    )


def difference(earlier: dict, here: RunIdentity) -> str | None:
    """The first flag in which two runs differ and both its values; None where one may go on with the other.

    Args:
        earlier: :meth:`RunIdentity.record` of the earlier run.
        here: what it does not know yet is not compared.
    """
    for name in sorted(earlier["settings"].keys() | here.settings.keys(), key=lambda name: (name[:2] == "--", name)):
        before, now = (settings.get(name) for settings in (earlier["settings"], here.settings))
        if before != now:
            return _versus(name, before, now)
    for name, digest in here.contents.items():
        if earlier["contents"].get(name) != digest:
            return _other_content(name, earlier["shown"], here.shown)
    if earlier["max_epochs"] > here.max_epochs:
        return _versus("--train.max_epochs", earlier["max_epochs"], here.max_epochs)
    return None


def _contents(args: SimpleNamespace, objective: Objective) -> dict[str, str]:
    """Digests by flag; the order in which differences are reported."""
    memory = args.flat.get("prior.cache_dir") or default_prior_cache_dir()
    model = args.model.model_name_or_path
    contents = {f"--{_MODEL}": weights_id(model, memory)}
    if objective.needs_prior:
        contents[f"--{_PRIOR}"] = weights_id(args.prior.model_name_or_path or model, memory)
    for name, files in ((_HEAD, (WEIGHTS_FILE, CONFIG_FILE)), (_OBJECTIVE, ("",))):
        path = args.flat.get(name)
        if path:
            hashes = [file_sha256(os.path.join(path, file) if file else path) for file in files]
            contents[f"--{name}"] = " ".join(hashes)
        else:
            contents[f"--{name}"] = ""
    return contents


def _other_content(name: str, before: dict, now: dict) -> str:
    flags = [name]
    if name == f"--{_DATA}":
        # Any of the data flags may have led to other samples; the data set itself is named last.
        flags = sorted((flag for flag in now if flag.startswith("--data.")), key=lambda flag: (flag == name, flag))
    for flag in flags:
        if before.get(flag) != now.get(flag):
            return _versus(flag, before.get(flag), now.get(flag))
    what = "data, tokenizer or chat template" if name == f"--{_DATA}" else "content"
    return f"{name} {_text(now.get(name))} with other {what}"


def _versus(name: str, before, now) -> str:
    return f"{name} {_text(before)}, here {_text(now)}"


def _plain(value):
    """JSON-ready, and equal where the meaning is: 0 and 0.0, targets of LoRA in any order."""
    if isinstance(value, list | tuple):
        values = [_plain(item) for item in value]
        return sorted(values) if all(isinstance(item, str) for item in values) else values
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_text, value))
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if not text.isprintable():
        text = repr(text)  # one line
    return text if len(text) <= 200 else text[:197] + "..."
