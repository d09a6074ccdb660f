"""The folders that a run writes to: whose they are, and which of their files a run wrote.

A run claims its folders by a manifest, ``run_manifest.json``, before it writes anything else there, and it begins only
where no file of anybody else's has a name that it will write. Until it has finished, all files of such names are its
own; then the manifest lists them. Nothing else is ever deleted or written over.
"""

import glob
import json
import os
import tempfile
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.model.adapters import adapter_base, is_adapter
from pipa_openrlhf.settings import flatten

MANIFEST = "run_manifest.json"
# Glob patterns of what runs write; the tokenizer's files and a model's code come on top.
_EXPORTED = (
    *("adapter_config.json", "adapter_model*.safetensors", "model*.safetensors", "model.safetensors.index.json"),
    *(
        "config.json",
        "generation_config.json",
        "value_head.safetensors",
        "value_head_config.json",
        "merged_base*/*",
        "value_model/*",
        "value_model/.export_parts/*",
        "value_model/.export_parts/model/*",
        ".export_*/*",
        ".export_parts/model/*",
    ),
    *("args.json", "config.yaml", "metrics.jsonl", "metrics.jsonl.new", "README.md", "skipped_rows.jsonl"),
)
_CHECKPOINTS = (
    *("global_step[0-9]*/*", "global_step[0-9]*/*/*"),
    # Of an export that was cut off; a star takes no name with a dot.
    *("global_step[0-9]*/.export_*/*", "global_step[0-9]*/.export_parts/model/*"),
    *("global_step[0-9]*/value_model/.export_*/*", "global_step[0-9]*/value_model/.export_parts/model/*"),
)


@dataclass(frozen=True)
class RunFolder:
    """One folder that a run writes to.

    Attributes:
        path: need not exist yet.
        names: patterns of the paths below it that runs write.
    """

    path: str
    names: tuple[str, ...]

    def written_by_runs(self) -> list[str]:
        """Files that runs of ours wrote, below ``path``."""
        try:
            with open(os.path.join(self.path, MANIFEST)) as file:
                manifest = json.load(file)
            listed = manifest["files"] + (self._matching() if manifest["is_open"] else [])
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (ValueError, KeyError, TypeError) as error:
            path = os.path.join(self.path, MANIFEST)
            raise UserError(f"{path} is damaged: give another folder, or delete it with what the run wrote") from error
        return sorted({name for name in listed if os.path.isfile(os.path.join(self.path, name))})

    def in_the_way(self) -> str | None:
        """A file that the run will write, but no run of ours did."""
        ours = set(self.written_by_runs())
        return next((os.path.join(self.path, name) for name in self._matching() if name not in ours), None)

    def claim(self) -> None:
        """A run writes here from now on."""
        os.makedirs(self.path, exist_ok=True)
        self._write(self.written_by_runs(), is_open=True)

    def close(self) -> None:
        """The run has finished: what is there now is what it wrote."""
        self._write(self.written_by_runs(), is_open=False)

    def delete(self) -> None:
        """Delete what runs of ours wrote, and the folders which that leaves empty."""
        for name in self.written_by_runs():
            os.remove(os.path.join(self.path, name))
            parent = os.path.dirname(name)
            while parent and not os.listdir(os.path.join(self.path, parent)):
                os.rmdir(os.path.join(self.path, parent))
                parent = os.path.dirname(parent)

    def _matching(self) -> list[str]:
        found = (path for pattern in self.names for path in glob.glob(pattern, root_dir=self.path))
        return sorted({path for path in found if os.path.isfile(os.path.join(self.path, path))})

    def _write(self, files: list[str], is_open: bool) -> None:
        path = os.path.join(self.path, MANIFEST)
        with open(path + ".new", "w") as file:
            json.dump({"is_open": is_open, "files": files}, file, indent=2)
        os.replace(path + ".new", path)


def run_folders(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> list[RunFolder]:
    """The output folder, and that of checkpoints where it is not inside."""
    exported = (*_EXPORTED, *_code_names(config.model.path))
    if tokenizer is not None:
        exported += tuple(map(glob.escape, _tokenizer_files(tokenizer)))
    output_dir, checkpoints = (os.path.abspath(path) for path in (config.ckpt.output_dir, config.ckpt.folder))
    below = os.path.relpath(checkpoints, output_dir)
    if below.split(os.sep)[0] == os.pardir:
        return [RunFolder(config.ckpt.output_dir, exported), RunFolder(config.ckpt.folder, _CHECKPOINTS)]
    inside = tuple(os.path.normpath(os.path.join(glob.escape(below), pattern)) for pattern in _CHECKPOINTS)
    return [RunFolder(config.ckpt.output_dir, exported + inside)]


def read_by_all(config: RunConfig, needs_prior: bool) -> dict[str, str]:
    """Folders, by flag, in which ranks read what others wrote."""
    folders = {"--prior.cache_dir": config.prior.cache_dir} if needs_prior else {}
    if config.ckpt.load_enable or not config.ckpt.disable_ds:
        flag = "--ckpt.path" if config.ckpt.path else "--ckpt.output_dir"
        folders[flag] = config.ckpt.path or config.ckpt.output_dir
    return folders


def check_output_dir(config: RunConfig) -> None:
    """Refuse a folder that holds another run, unless told to resume or to delete it.

    Raises:
        UserError: names the folder and the ways out.
    """
    output_dir = config.ckpt.output_dir
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise UserError(f"--ckpt.output_dir {output_dir} is a file: give a folder")
    existing = os.path.abspath(output_dir)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--ckpt.output_dir {output_dir} cannot be written to: {existing} is not a writable folder")
    inputs = _inputs(config)
    for flag, path in inputs:
        if path == os.path.realpath(output_dir):
            raise UserError(f"--ckpt.output_dir {output_dir} is also --{flag}: give another folder")
    if config.ckpt.load_enable:
        return
    folders = run_folders(config)
    written = [os.path.join(folder.path, name) for folder in folders for name in folder.written_by_runs()]
    if written and not config.ckpt.overwrite:
        raise UserError(
            f"--ckpt.output_dir {output_dir} holds another run: resume it with --ckpt.load_enable, delete it with "
            "--ckpt.overwrite, or give another folder"
        )
    for path in written:
        for flag, source in inputs:
            if os.path.commonpath([os.path.realpath(path), source]) == source:
                raise UserError(f"--ckpt.overwrite would delete {path}, which --{flag} needs: give another folder")


def claim_folders(folders: list[RunFolder], overwrite: bool) -> None:
    """Make the folders this run's, on rank 0 before anything is written; ``overwrite`` deletes earlier runs there.

    Raises:
        UserError: the run would write over a file of somebody else's; nothing was deleted.
    """
    for folder in folders:
        path = folder.in_the_way()
        if path is not None:
            raise UserError(
                f"{path} is not from a run that {MANIFEST} knows, and this run would write over it: move it away, or "
                "give another folder"
            )
    for folder in folders:
        if overwrite:
            folder.delete()
        folder.claim()


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of any library that writes a tokenizer
            raise UserError(
                f"the tokenizer could not be exported at the end of the run: {first_line(error)}"
            ) from error
        return os.listdir(folder)


def _code_names(model: str) -> tuple[str, ...]:
    """Names of a model's own code, which is exported with it."""
    return tuple(map(glob.escape, glob.glob("*.py", root_dir=model)) if os.path.isdir(model) else ())


def _inputs(config: RunConfig) -> list[tuple[str, str]]:
    """Flags that name files or folders of the run, and their real paths, bases of adapters included."""
    values = flatten(config)
    found = []
    for flag in ("model.model_name_or_path", "prior.model_name_or_path", "ref.model_name_or_path"):
        path = values.get(flag)
        while path:
            found.append((flag, path))
            path = adapter_base(path)[0] if is_adapter(path) else None
    found += [
        (flag, values.get(flag) or "")
        for flag in ("value.init_from", "pipa.objective_module", "data.tokenizer_chat_template")
    ]
    for flag in ("data.dataset", "eval.dataset"):
        found += [(flag, name.split("@")[0].strip()) for name in (values.get(flag) or "").split(",")]
    return [(flag, os.path.realpath(path)) for flag, path in found if path and os.path.exists(path)]
