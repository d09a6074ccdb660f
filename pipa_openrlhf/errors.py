"""The exceptions that a command line turns into one readable line, and what is asked of paths and packages."""

import importlib.util
import os


class UserError(Exception):
    """Something the user can put right: a flag, a path, a line of data.

    The message is one line that says what is wrong, where, and what to do.
    """


class Stopped(KeyboardInterrupt):
    """Asked to stop, a run did, and what it had done is on disk: the same command with --ckpt.load_enable goes on."""


def first_line(error: BaseException) -> str:
    """What an exception says, on one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_adapter(path: str) -> bool:
    """True for a folder that holds a PEFT adapter rather than a model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def check_model_path(path: str, flag: str) -> None:
    """A path that looks local must hold a model or an adapter; anything else is left to the hub.

    Raises:
        UserError: there is no such folder, or it holds neither.
    """
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    if os.path.isdir(path):
        if not is_adapter(path) and not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{flag} {path}: the folder has no config.json and no adapter_config.json")
    elif looks_local or os.path.exists(path):
        raise UserError(f"{flag} {path}: no such folder")


def check_downloads(use_ms: bool) -> None:
    """Raises UserError where ModelScope is wanted and absent."""
    if use_ms and importlib.util.find_spec("modelscope") is None:
        raise UserError("--use_ms needs the modelscope package: pip install modelscope")


def need_package(flag: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--{flag} needs the {package} package and a CUDA device: pip install {package}")
