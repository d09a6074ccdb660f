"""Peak memory of a training step at 7B, without weights: ours, and OpenRLHF's DPO through its own model and trainer.

    python benchmarks/memory_7b.py [--output FILE]

Both steps run on the meta device, bf16, LoRA rank 64, ZeRO-2 on one rank. Every storage is counted while it is alive,
temporaries included. Attention and flash-attn's cross-entropy are stand-ins that allocate what those kernels allocate.
Not in it: what an allocator rounds up or leaves unused, the accelerator's context, communication between ranks.
"""

import argparse
import sys
import types
import weakref
from types import SimpleNamespace

import torch
from measure import GIB, print_head, print_ratio, print_table, write_json
from shapes import ATTENTION, MODELS, RANK, CrossEntropy, language_model, our_actor, our_loss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from pipa_openrlhf.distributed.upstream import Actor

# isort: split
# OpenRLHF's trainers import flash-attn where ours has not put its stand-in first.
from openrlhf.models.loss import DPOLoss
from openrlhf.trainer.dpo_trainer import DPOTrainer

LENGTH, PROMPT = 2048, 512
MOST = 0.55
# By hand, GiB: weights, adapters with Adam, checkpoints, one layer, one chunk of the head.
FLOORS = {"DeepSeek-Math-7B": 14, "Qwen2.5-Math-7B": 16}
PARTS = ("weights", "weights of a second model", "float32 masters and Adam", "kept for the backward pass")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make inside the ``with`` block until they are freed."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._known = [one.untyped_storage() for some in modules for one in (*some.parameters(), *some.buffers())]
        self._known_keys = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Under a dispatch mode autograd makes new tensors where it otherwise works in place; with gradients enabled
        # it is a forward pass that checkpointing runs again.
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            func = _IN_PLACE.get(func, func)
            if _is_sum_in_place(func, *args):
                return args[0].add_(args[1])
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known_keys:
            return

        def forget(_) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


# The gradients of gather and index_select add to zeros that were made for it.
_IN_PLACE = {
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
}


def _is_sum_in_place(func, *args) -> bool:
    """Whether autograd adds a second gradient to one that nobody else holds."""
    if func is not torch.ops.aten.add.Tensor or not isinstance(args[1], torch.Tensor):
        return False
    alike = args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
    return alike and _references(args[0]) == _UNSHARED


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _references_of_unshared() -> tuple[int, int]:
    class Look(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.add.Tensor:
                self.seen = _references(args[0])
            return func(*args, **(kwargs or {}))

    with Look() as look:
        product = torch.ones(2, requires_grad=True) * 2
        (product[:1].sum() * product[1:].sum()).backward()
    return look.seen


_UNSHARED = _references_of_unshared()


def measure(make_loss, bucket: int, actor: nn.Module, other: nn.Module | None = None) -> dict[str, int]:
    """Bytes of a step by what they are for, and their peak; ``bucket``: elements of DeepSpeed's gradient bucket."""
    trained = [one for one in actor.parameters() if one.requires_grad]
    before = []

    with LiveBytes(actor, *([other] if other else [])) as memory:

        def on_gradient(parameter: torch.Tensor) -> None:
            # DeepSpeed moves a gradient into its bucket as soon as it is there.
            parameter.grad = None
            if not before:
                before.append(memory.peak)
                memory.peak = memory.live

        hooks = [one.register_post_accumulate_grad_hook(on_gradient) for one in trained]
        loss = make_loss()
        kept = memory.live
        loss.backward()
    for hook in hooks:
        hook.remove()
    count = sum(one.numel() for one in trained)
    # bf16 weights; float32 masters and two moments; a bf16 bucket from the first gradient on.
    weights = 2 * sum(one.numel() for one in actor.parameters())
    second = 2 * sum(one.numel() for one in other.parameters()) if other else 0
    peak = weights + second + 12 * count + max(before[0], memory.peak + 2 * bucket)
    return {**dict(zip(PARTS, (weights, second, 12 * count, kept))), "peak": peak}


def our_step(config: PretrainedConfig, sequences: int) -> dict[str, int]:
    """PIPA-M's step."""
    actor = our_actor(config, ATTENTION, checkpointing=True)
    bucket = sum(one.numel() for one in actor.parameters() if one.requires_grad)  # our strategy asks for that much
    return measure(our_loss(actor, sequences, LENGTH, PROMPT), bucket, actor)


def openrlhf_step(config: PretrainedConfig) -> dict[str, int]:
    """DPO's step on one pair, with flash-attn's cross-entropy: without it more is kept."""
    actor, reference = (_upstream_actor(language_model(config, ATTENTION, rank)) for rank in (RANK, 0))
    actor.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(ring_attn_group=None),
        tokenizer=SimpleNamespace(pad_token_id=0),
        concatenated_inputs=lambda *args: DPOTrainer.concatenated_inputs(trainer, *args),
        _get_batch_logps=lambda *args: DPOTrainer._get_batch_logps(trainer, *args),
    )
    ids = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
    inputs = (ids, torch.ones_like(ids), ids, torch.ones_like(ids), [PROMPT])

    def loss() -> torch.Tensor:
        chosen, rejected, _, _ = DPOTrainer.concatenated_forward(trainer, actor, *inputs)
        with torch.no_grad():
            of_reference = DPOTrainer.concatenated_forward(trainer, reference, *inputs)
        return DPOLoss(0.1)(chosen, rejected, *of_reference[:2])[0]

    kernel = types.SimpleNamespace(cross_entropy_loss=lambda *args: (CrossEntropy.apply(*args), None))
    sys.modules["flash_attn.ops.triton.cross_entropy"] = kernel
    # In favour of upstream: the bucket, for which DeepSpeed takes a gigabyte, is left out.
    return measure(loss, 0, actor.train(), reference.eval())


def _upstream_actor(lm: nn.Module) -> Actor:
    # Its constructor sets both only where it loads the weights itself.
    lm.config.use_cache = False
    actor = Actor(lm)
    actor.packing_samples = False
    return actor


def main() -> None:
    """Measure, print one table a model with its verdict, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/memory_7b.json")
    options = parser.parse_args()
    print_head()
    result = {}
    for name, config in MODELS.items():
        columns = {"one sequence": our_step(config, 1), "one pair": our_step(config, 2)}
        columns["DPO, one pair"] = openrlhf_step(config)
        print(f"\n{name}, sequences of {LENGTH}, gradient checkpointing (GiB); by hand, one sequence: {FLOORS[name]}")
        rows = [[part, *(f"{one[part] / GIB:.2f}" for one in columns.values())] for part in (*PARTS, "peak")]
        print_table(["", *columns], rows)
        ratio = columns["one pair"]["peak"] / columns["DPO, one pair"]["peak"]
        print_ratio("ours / OpenRLHF DPO, peak memory", ratio, most=MOST)
        result[name] = {**columns, "ratio": ratio}
    write_json(options.output, {"models": result})


if __name__ == "__main__":
    main()
