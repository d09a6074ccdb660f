"""Micro-batches come to the device in order, on an accelerator with the next one on its way."""

from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace

import pytest
import torch
from prefix_trees import branching_samples

from pipa_openrlhf.data.batch import Batch, collate, map_tensors
from pipa_openrlhf.data.training_set import MicroBatch
from pipa_openrlhf.distributed import transfer
from pipa_openrlhf.distributed.transfer import on_device


@dataclass(frozen=True)
class Item:
    ids: torch.Tensor
    name: str


class FakeAccelerator:
    """Writes down what a real one is asked for."""

    def __init__(self):
        self.log: list[str] = []
        self.Stream = lambda: "side stream"
        self.Event = lambda: SimpleNamespace(
            record=lambda stream: self.log.append(f"event on {stream}"),
        )

    def pin_memory(self, tensor):
        self.log.append(f"pin {int(tensor)}")
        return tensor.clone()

    @contextmanager
    def stream(self, stream):
        self.log.append(f"copy on {stream}")
        yield
        self.log.append("back")

    def current_stream(self):
        return SimpleNamespace(wait_event=lambda event: self.log.append("wait"))


@pytest.fixture
def accelerator(monkeypatch):
    fake = FakeAccelerator()
    monkeypatch.setattr(transfer, "get_accelerator", lambda: fake)
    monkeypatch.setattr(transfer, "on_cpu", lambda: False)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: fake.log.append(f"keep {int(tensor)}"), raising=False
    )
    return fake


def copy_of(number: int) -> list[str]:
    return [f"pin {number}", "copy on side stream", "back", "event on side stream"]


def test_the_next_one_is_copied_while_one_is_used(accelerator):
    for item in on_device(Item(torch.tensor(number), str(number)) for number in range(3)):
        accelerator.log.append(f"use {item.name}")
    used = [["wait", f"keep {number}", f"use {number}"] for number in range(3)]
    expected = [*copy_of(0), *copy_of(1), *used[0], *copy_of(2), *used[1], *used[2]]
    assert accelerator.log == expected


def test_there_may_be_one_or_none(accelerator):
    assert list(on_device([])) == [] and accelerator.log == []
    (item,) = on_device([Item(torch.tensor(7), "seven")])
    assert item.name == "seven" and item.ids == 7


def tensors_of(holder) -> list[torch.Tensor]:
    values = [getattr(holder, field.name) for field in fields(holder)]
    inner = [tensor for one in values if is_dataclass(one) for tensor in tensors_of(one)]
    return [one for one in values if torch.is_tensor(one)] + inner


def test_every_tensor_of_a_batch_is_moved():
    """The trees and keys of a shared row, too."""
    batch = collate(branching_samples(97) * 4, None, 0, "shared")
    assert batch.shared_row.trees is not None
    before = tensors_of(batch)
    assert len(before) == 12 + 2 + 3 + 3
    moved = map_tensors(MicroBatch(batch, is_idle=True), lambda one: one + 1)
    assert isinstance(moved.batch, Batch) and moved.is_idle and moved.batch.shared_row.repeats
    for one, other in zip(tensors_of(moved), before, strict=True):
        assert torch.equal(one, other + 1)


def test_on_a_cpu_items_are_taken_one_at_a_time():
    taken = []

    def items():
        for number in range(3):
            taken.append(number)
            yield Item(torch.tensor(number), str(number))

    for item in on_device(items()):
        assert taken[-1] == int(item.ids)
