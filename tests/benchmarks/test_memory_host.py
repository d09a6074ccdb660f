"""Estimates of host memory, by hand: bytes that are held at once before a file is written."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

from memory_host import checkpoint_bytes, export_bytes, resume_bytes  # noqa: E402

SHAPES = [("model.layers.0.a", 10), ("model.layers.0.b", 20), ("model.layers.1.a", 10), ("head", 5)]


def test_a_checkpoint_holds_its_pieces_until_they_fill_a_file_twice():
    """12 bytes an element: 120, 240, 120 and 60."""
    assert checkpoint_bytes(SHAPES, ranks=1, file_bytes=1000) == 2 * 540
    assert checkpoint_bytes(SHAPES, ranks=1, file_bytes=130) == 2 * 360
    assert checkpoint_bytes(SHAPES, ranks=10, file_bytes=1000) == 2 * 12 * (1 + 2 + 1 + 1)


def test_an_export_holds_a_shard_twice_and_the_layer_that_did_not_fit():
    """Layers of 60, 20 and 10 bytes at 2 bytes an element."""
    assert export_bytes(SHAPES, itemsize=2, shard_bytes=1000) == 2 * 90
    assert export_bytes(SHAPES, itemsize=2, shard_bytes=70) == 2 * 60 + 20 + 10


def test_reading_holds_the_master_of_the_largest_parameter():
    assert resume_bytes(SHAPES) == 20 * 4
