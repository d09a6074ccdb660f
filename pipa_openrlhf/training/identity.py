"""What decides the result of a run: one record with one digest, kept with its checkpoints and with the finished run.

Every setting decides unless its field says otherwise (``role`` in ``settings.py``), so that a new one decides.
Paths count by what lies behind them: a model that was moved is the same model, data that was edited are other data.
"""

import hashlib
import json
import logging
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import datetime

import torch

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.strategy import Strategy
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE
from pipa_openrlhf.objectives.table import Objective
from pipa_openrlhf.prior.cache import NUMERICS_VERSION, file_sha256, weights_id
from pipa_openrlhf.settings import BY_CONTENT, DECIDES, flatten, settings_of
from pipa_openrlhf.training.checkpoint import newest_checkpoint, read_state
from pipa_openrlhf.training.records import read_args

log = logging.getLogger(__name__)

# Raised when the same settings lead to another result: another order of batches, another loss.
RUN_VERSION = 1

_MODEL, _PRIOR = "model.model_name_or_path", "prior.model_name_or_path"
_HEAD, _OBJECTIVE, _DATA = "value.init_from", "pipa.objective_module", "data.dataset"


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


def identify(config: RunConfig, objective: Objective, started: str | None = None) -> RunIdentity:
    """Identity of the run that checked flags describe, as far as it is known before the data are read.

    Args:
        started: of the run that is resumed; None: now.

    Raises:
        UserError: a model folder holds no weights.
    """
    prior = config.prior_path if objective.needs_prior else None
    values = {name: _plain(value) for name, value in {**flatten(config), _PRIOR: prior}.items()}
    roles = {one.name: one.spec.role for one in settings_of(config)}
    settings = {f"--{name}": value for name, value in values.items() if roles[name] == DECIDES}
    settings["module"] = config.objective.module
    settings["objective"] = config.objective.flag_group
    settings["version of the computation"] = f"{RUN_VERSION}.{NUMERICS_VERSION}"
    return RunIdentity(
        settings=settings,
        contents=_contents(config, objective),
        shown={f"--{name}": value for name, value in values.items() if roles[name] == BY_CONTENT},
        max_epochs=config.train.max_epochs,
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


def _contents(config: RunConfig, objective: Objective) -> dict[str, str]:
    """Digests by flag; the order in which differences are reported."""
    memory = config.prior.cache_dir
    model = config.model.path
    contents = {f"--{_MODEL}": weights_id(model, memory)}
    if objective.needs_prior:
        contents[f"--{_PRIOR}"] = weights_id(config.prior_path or model, memory)
    paths = flatten(config)
    for name, files in ((_HEAD, (HEAD_WEIGHTS_FILE, HEAD_CONFIG_FILE)), (_OBJECTIVE, ("",))):
        path = paths.get(name)
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


@dataclass(frozen=True)
class Start:
    """Where a run starts; the same on every rank.

    Attributes:
        identity: of the run that starts.
        checkpoint: to resume; None: from step 0.
        finished: the output folder holds this very run, finished.
        earlier: identities that must be met, by the path that keeps them.
    """

    identity: RunIdentity
    checkpoint: str | None = None
    finished: bool = False
    earlier: tuple[tuple[str, dict], ...] = ()

    def with_data(self, fingerprint: str, strategy: Strategy) -> "Start":
        """The same once the data are read. A collective call.

        Raises:
            UserError: ranks read other data than rank 0, or the earlier run did.
        """
        ranks: list[tuple[str, str]] = [("", "")] * strategy.world_size
        torch.distributed.all_gather_object(ranks, (socket.gethostname(), fingerprint))
        others = [f"rank {rank} ({host})" for rank, (host, found) in enumerate(ranks) if found != ranks[0][1]]
        if others:
            raise UserError(
                f"--data.dataset: {', '.join(others)} got other samples than rank 0 ({ranks[0][0]}): give every node "
                "the same data, tokenizer and package versions"
            )
        here = replace(self, identity=self.identity.with_data(fingerprint))
        here.refuse_another_run()
        return here

    def refuse_another_run(self) -> None:
        """Compare with the runs that are there.

        Raises:
            UserError: one differs in a flag, which is named with both values.
        """
        for path, record in self.earlier:
            different = difference(record, self.identity)
            if different:
                raise UserError(
                    f"{path} holds a run with {different}: resume it with the same one, or give another "
                    "--ckpt.output_dir"
                )


def find_start(config: RunConfig, objective: Objective, strategy: Strategy) -> Start:
    """Look for an earlier run, and tell every rank. A collective call.

    Raises:
        UserError: with ``--ckpt.load_enable``, the folders hold another run.
    """
    if not config.ckpt.load_enable:
        return strategy.from_rank_0(lambda: Start(identify(config, objective)))
    checkpoint = newest_checkpoint(config.ckpt.folder, strategy)
    return strategy.from_rank_0(lambda: _find_start(config, objective, checkpoint))


def _find_start(config: RunConfig, objective: Objective, checkpoint: str | None) -> Start:
    last_args = read_args(config.ckpt.output_dir)
    found = {}
    if checkpoint is not None:
        found[checkpoint] = read_state(checkpoint)["identity"]
    if last_args is not None:
        found[config.ckpt.output_dir] = last_args.get("resolved.identity")
    for path, record in found.items():
        if not isinstance(record, dict) or "digest" not in record:
            raise UserError(
                f"{path} was written by a version that did not keep what decides a run: delete it with "
                "--ckpt.overwrite, or give another --ckpt.output_dir"
            )
    started = next((record["started"] for record in found.values()), None)
    start = Start(identify(config, objective, started), checkpoint, earlier=tuple(found.items()))
    start.refuse_another_run()
    if last_args is not None and last_args.get("resolved.finished"):
        if found[config.ckpt.output_dir]["max_epochs"] == config.train.max_epochs:
            return replace(start, finished=True)
        if checkpoint is None:
            raise UserError(
                f"{config.ckpt.output_dir} holds a finished run without a checkpoint, so that more --train.max_epochs "
                "cannot go on from it: give another --ckpt.output_dir, or --ckpt.overwrite"
            )
    if checkpoint is None:
        log.info(f"No checkpoint in {config.ckpt.folder}: starting from step 0")
    return start
