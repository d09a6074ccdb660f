"""How many bytes of tensors are alive while code runs, on any device, the meta device included."""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside the ``with`` block, temporaries included, until they are freed.

    What existed before is not counted where it is named in ``known``: parameters, inputs. An operation's hidden
    workspace, and what an allocator rounds up or keeps back, is not seen.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at one time.
        peak_of: the peak as bytes by (operation, dtype, shape).
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.peak_of: Counter = Counter()
        self._alive: dict[int, tuple[weakref.ref, int, tuple]] = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._known_keys = {storage._cdata for storage in self._known}
        self._at_new_peak = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Under a dispatch mode autograd makes new tensors where it otherwise works in place.
        if _is_sum_of_gradients(func, args):
            return args[0].add_(args[1])
        if func in _IN_PLACE and _in_backward():
            func = _IN_PLACE[func]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, func)
        return output

    def restart_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live
        self._at_new_peak = True

    def top(self, number: int) -> list[dict]:
        """The largest parts of the peak."""
        self._keep_peak()
        return [
            {"operation": what[0], "dtype": what[1], "shape": list(what[2]), "bytes": size}
            for what, size in self.peak_of.most_common(number)
        ]

    def _see(self, tensor: torch.Tensor, func) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known_keys:
            return
        size = storage.nbytes()
        what = (str(func), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, what)
        self.live += size
        if self.live > self.peak:
            self.peak, self._at_new_peak = self.live, True

    def _forget(self, key: int) -> None:
        # What the peak consists of is written down at the first release after it: at every rise would be slow.
        self._keep_peak()
        self.live -= self._alive.pop(key)[1]

    def _keep_peak(self) -> None:
        if self._at_new_peak:
            self._at_new_peak = False
            self.peak_of = Counter()
            for _, size, what in self._alive.values():
                self.peak_of[what] += size


# The gradients of gather and index_select add to zeros that were made for it.
_IN_PLACE = {
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
}


def _in_backward() -> bool:
    # With gradients enabled it is a forward pass that checkpointing runs again.
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _is_sum_of_gradients(func, args) -> bool:
    """Whether autograd adds a second gradient to one that nobody else holds."""
    if func is not torch.ops.aten.add.Tensor or not _in_backward():
        return False
    first, second = args
    same = isinstance(second, torch.Tensor) and first.shape == second.shape and first.dtype == second.dtype
    return same and _references(first) == _UNSHARED


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


class _References(TorchDispatchMode):
    """Notes the references to the first summand of every sum."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor:
            self.seen.append(_references(args[0]))
        return func(*args, **(kwargs or {}))


def _references_of_unshared_gradient() -> tuple[int, int]:
    product = torch.ones(2, requires_grad=True) * 2
    loss = product.narrow(0, 0, 1).sum() * product.narrow(0, 1, 1).sum()
    with _References() as references:
        loss.backward()
    return references.seen[0]


_UNSHARED = _references_of_unshared_gradient()


def storages_of(*modules: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, as ``known`` of :class:`LiveBytes` takes them."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
