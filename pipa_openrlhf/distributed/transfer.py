"""Micro-batches on their way to the device: on an accelerator the next one is copied while this one is computed."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from pipa_openrlhf.data.batch import map_tensors
from pipa_openrlhf.distributed.strategy import device, on_cpu

_Item = TypeVar("_Item")


def on_device(items: Iterable[_Item]) -> Iterator[_Item]:
    """``items``, dataclasses that hold tensors, in their order, with the tensors on this process's device.

    On an accelerator one item is taken ahead of the one that is given out, put into pinned memory, and copied from
    there on a stream of its own.
    """
    if on_cpu():
        yield from (_moved(item) for item in items)
        return
    copies = _copy_stream(get_accelerator())
    ahead = None
    for item in items:
        following = _start_copy(item, copies)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead)


@cache
def _copy_stream(accelerator: Any) -> Any:
    """One for all: the allocator keeps the memory of each stream apart."""
    return accelerator.Stream()


def _moved(item: _Item) -> _Item:
    return map_tensors(item, lambda one: one.to(device(), non_blocking=True))


def _start_copy(item: _Item, copies: Any) -> tuple[_Item, Any]:
    """The item on the device, and the event that says that it is there."""
    accelerator = get_accelerator()
    pinned = map_tensors(item, accelerator.pin_memory)
    with accelerator.stream(copies):
        moved = _moved(pinned)
    event = accelerator.Event()
    event.record(copies)
    return moved, event


def _arrived(item: _Item, event: Any) -> _Item:
    """The item, safe to use on the current stream."""
    current = get_accelerator().current_stream()
    current.wait_event(event)

    def in_use(one: torch.Tensor) -> torch.Tensor:
        # It was allocated on the other stream, which would hand its memory out again without waiting for this one.
        one.record_stream(current)
        return one

    return map_tensors(item, in_use)
