"""What every entry point does around its own work: parse, run, and end in one readable line."""

import os
from collections.abc import Callable
from types import SimpleNamespace

from safetensors import SafetensorError

from pipa_openrlhf.cli.args import parse_args
from pipa_openrlhf.cli.rank_errors import show_error
from pipa_openrlhf.errors import UserError


def run(main: Callable[[SimpleNamespace], int | None], module: str, argv: list[str] | None = None) -> int:
    """Exit status of ``main(args)``: 0, 1 after a mistake of the user's, 130 after ctrl-C.

    Errors nobody foresaw keep their traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        return main(parse_args(module, argv)) or 0
    except UserError as error:
        message, status = f"error: {error}", 1
    except OSError as error:
        # A full disk, a folder that cannot be written: the system's own words and the path say it best.
        where = f": {error.filename}" if error.filename else ""
        message, status = f"error: {error.strerror or error}{where}", 1
    except SafetensorError as error:
        # A full disk again, met by the library that writes weights.
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:
        message, status = ("interrupted" if rank == 0 else ""), 130
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        message, status = "stopped because another rank did", 1
    if message:
        show_error(message)
    return status
