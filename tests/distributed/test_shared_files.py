"""Folders that all nodes must see: looked for at the start, with two ranks whose relative paths are two folders."""

import os
import socket
import threading

import pytest
from several_runs import TwoRanks

from pipa_openrlhf import lag
from pipa_openrlhf.lag import first_missing


def test_a_file_that_appears_late_is_waited_for(tmp_path):
    (tmp_path / "hidden").touch()
    late = threading.Timer(0.5, os.rename, (tmp_path / "hidden", tmp_path / "shown"))
    late.start()
    assert first_missing(str(tmp_path), ["shown"]) is None
    late.join()


def test_the_wait_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lag, "LAG", 0.3)
    (tmp_path / "there").touch()
    assert first_missing(str(tmp_path), ["there", "b", "a"]) == "b"
    assert first_missing(str(tmp_path / "no folder"), ["a"]) == "a"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """Two ranks, each in a folder of its own."""
    root = tmp_path_factory.mktemp("nodes")
    nodes = [root / "node0", root / "node1"]
    for node in nodes:
        node.mkdir()
    ranks = TwoRanks(root, nodes, lag=1)
    yield ranks.run
    ranks.close()


# What is not shared, beside the flags that make a run need it, and how the line about it goes on.
NOT_SHARED = {
    "checkpoints": (
        {"ckpt.output_dir": "out"},
        "--ckpt.output_dir out: rank 1 (HOST) does not see what rank 0 (HOST) writes there: give a folder on a file "
        "system that all nodes share, or, for a run without checkpoints, --ckpt.disable_ds and no --ckpt.load_enable",
    ),
    "the prior's cache": (
        {"prior.cache_dir": "cache", "ckpt.disable_ds": True},
        "--prior.cache_dir cache: rank 1 (HOST) does not see what rank 0 (HOST) writes there: give a folder on a file "
        "system that all nodes share (",
    ),
}


def test_a_run_that_needs_nothing_shared_has_folders_on_each_node(small_run, two_nodes, tmp_path):
    own = {"ckpt.output_dir": "alone", "ckpt.save_steps": None, "ckpt.max_num": None, "ckpt.disable_ds": True}
    words = small_run("x", **own, **{"data.annotation": "answer", "train.max_epochs": 1})
    left_out = {"--prior.model_name_or_path", "--prior.cache_dir", "--pipa.variant"}  # SFT has none
    words = [
        word for place, word in enumerate(words) if word not in left_out and words[max(place - 1, 0)] not in left_out
    ]
    result = two_nodes("train_sft", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Model written to alone" in result.stdout


@pytest.mark.parametrize("changes, line", NOT_SHARED.values(), ids=NOT_SHARED)
def test_a_folder_that_a_node_does_not_see_is_named_at_the_start(small_run, two_nodes, changes, line):
    result = two_nodes("train_pipa", *small_run("x", **changes))
    assert result.returncode == 1
    assert f"error: {line.replace('HOST', socket.gethostname())}" in result.stderr
    assert "Prior log-probs" not in result.stderr  # before anything is computed
