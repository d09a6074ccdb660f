"""PIPA (Prior-Informed Preference Alignment) as a plugin on OpenRLHF.

``pipa_openrlhf.train(pipa_openrlhf.RunConfig(...))`` is a training run; the command lines call the same.
"""

from importlib import import_module

__version__ = "0.1.0"
# Imported at first use: the package itself is imported by commands that need no torch.
_PUBLIC = {
    "RunConfig": "pipa_openrlhf.config",
    "Result": "pipa_openrlhf.training.run",
    "Callback": "pipa_openrlhf.training.trainer",
}
__all__ = ["Callback", "Result", "RunConfig", "train"]


def train(config, callbacks=()):
    """See :func:`pipa_openrlhf.training.run.train`."""
    from pipa_openrlhf.training.run import train as run

    return run(config, callbacks)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(name)
    return getattr(import_module(_PUBLIC[name]), name)
