"""The one place that imports OpenRLHF's models, strategy and data helpers.

``openrlhf.models`` imports two flash_attn modules at its top. On a machine without flash-attn they are replaced for
the duration of that import by transformers' own padding helpers, and taken away again, so that nothing else believes
flash-attn to be installed.
"""

import importlib.machinery
import importlib.util
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

from openrlhf.datasets.utils import blending_datasets  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.models.actor import _patch_zero3_weight_mapping as patch_zero3_weight_mapping  # noqa: E402
from openrlhf.models.utils import set_z3_leaf_modules  # noqa: E402
from openrlhf.utils.deepspeed import DeepspeedStrategy  # noqa: E402
from openrlhf.utils.distributed_sampler import DistributedSampler  # noqa: E402

__all__ = [
    "Actor",
    "DeepspeedStrategy",
    "DistributedSampler",
    "blending_datasets",
    "patch_zero3_weight_mapping",
    "set_z3_leaf_modules",
]
