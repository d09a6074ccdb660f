"""The one place that imports OpenRLHF's models, strategy and data helpers.

What is taken from it, and what for:

===============================  ===================================================================================
``Actor``                        base of our PolicyActor: gradient checkpointing, and what the strategy can prepare
``DeepspeedStrategy``            base of our Strategy: DeepSpeed's configs, optimizers, preparing of models, seeds,
                                 ranks. Of its private methods ours overrides ``_ds_init_train_model`` and
                                 ``_get_model_parameters``
``set_z3_leaf_modules``          mixtures of experts under ZeRO-3
``_patch_zero3_weight_mapping``  loading of renamed weights under ZeRO-3
``blending_datasets``            reading of data sets from files, folders and the hub
===============================  ===================================================================================

None of them knows of DPO: OpenRLHF's SFT and reward trainers use them too. Should OpenRLHF drop its DPO, as it did
KTO, training here goes on unchanged: the flags are written out in ``config.py``, and the losses are ours. What
compares us with it would stay at the last version that has it, or go: ``tests/cli/test_upstream_flags.py`` reads the
flags of ``openrlhf.cli.train_dpo``, tests of the losses call ``DPOLoss``, ``benchmarks/`` runs ``DPOTrainer``. Should
one of the names above move or go, this file is where to import it from its new place, or to put a copy of our own.

``openrlhf.models`` imports two flash_attn modules at its top. On a machine without flash-attn they are replaced for
the duration of that import by transformers' own padding helpers, and taken away again, so that nothing else believes
flash-attn to be installed.
"""

import collections
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
import types
from contextlib import contextmanager

from pipa_openrlhf.errors import UserError

REQUIRED_VERSION = "0.11.2"


def flash_attn_installed() -> bool:
    """True where the real flash-attn can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def _needs_ring_attention(*_args, **_kwargs):
    raise UserError("ring attention needs flash-attn: install it, or leave --ds.ring_attn_size at 1")


@contextmanager
def _flash_attn_standin():
    """Provide ``flash_attn.bert_padding`` and ``flash_attn.utils.distributed`` while OpenRLHF is imported."""
    from einops import rearrange
    from transformers import modeling_flash_attention_utils as padding

    def module(name, **attributes):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        made.__dict__.update(attributes)
        return made

    modules = [
        module("flash_attn"),
        module(
            "flash_attn.bert_padding",
            index_first_axis=padding._index_first_axis,
            pad_input=padding._pad_input,
            unpad_input=padding._unpad_input,
            rearrange=rearrange,
        ),
        module("flash_attn.utils"),
        module("flash_attn.utils.distributed", all_gather=_needs_ring_attention),
    ]
    sys.modules.update({made.__name__: made for made in modules})
    try:
        yield
    finally:
        for made in modules:
            sys.modules.pop(made.__name__, None)


def _name_another_version() -> None:
    """One line, from the first rank, where the installed OpenRLHF is not the one that this package was tested with."""
    try:
        found = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        found = "without a version"
    if found.split("+")[0] != REQUIRED_VERSION and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning(
            "OpenRLHF %s is installed; pipa_openrlhf was tested with %s: pip install openrlhf==%s",
            *(found, REQUIRED_VERSION, REQUIRED_VERSION),
        )


def _import_openrlhf():
    try:
        if flash_attn_installed():
            import openrlhf.models  # noqa: F401
        else:
            with _flash_attn_standin():
                import openrlhf.models  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot import OpenRLHF: {error}; run scripts/install.sh or pip install openrlhf=={REQUIRED_VERSION}"
        ) from error


_import_openrlhf()
_name_another_version()

from openrlhf.datasets.utils import blending_datasets  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.models.actor import _patch_zero3_weight_mapping  # noqa: E402
from openrlhf.models.utils import set_z3_leaf_modules  # noqa: E402
from openrlhf.utils.deepspeed import DeepspeedStrategy  # noqa: E402
from transformers.integrations import deepspeed as hf_deepspeed  # noqa: E402


def patch_zero3_weight_mapping() -> None:
    """Make transformers keep weights under ZeRO-3 that need no renaming, by OpenRLHF's patch.

    That patch corrects one converted state dict. Newer versions of transformers convert it part by part instead.
    """
    convert = hf_deepspeed._apply_weight_conversions_to_state_dict
    if not inspect.isgeneratorfunction(convert):
        _patch_zero3_weight_mapping()
        return

    def as_one(*args):
        return dict(collections.ChainMap(*convert(*args)))

    hf_deepspeed._apply_weight_conversions_to_state_dict = as_one
    _patch_zero3_weight_mapping()
    patched = hf_deepspeed._apply_weight_conversions_to_state_dict

    @functools.wraps(patched)  # with the mark that says so
    def in_parts(*args):
        return [patched(*args)]

    hf_deepspeed._apply_weight_conversions_to_state_dict = in_parts


__all__ = [
    "Actor",
    "DeepspeedStrategy",
    "blending_datasets",
    "patch_zero3_weight_mapping",
    "set_z3_leaf_modules",
]
