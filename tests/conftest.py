"""Fixtures that every part of the tests shares."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: two processes of two threads each on a small machine slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# What is heavy is imported where it is used: the process that only hands tests to others starts without it.

# How long an example takes says how busy the machine is. `make quick` asks for the second.
hypothesis.settings.register_profile("whole", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=10)
hypothesis.settings.load_profile("whole")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# Three batches of four an epoch, the last of them partial.
ROWS = [
    {
        "prompt": f"{n}+{n}?\n",
        "completions": ["x" * (n % 4 + 1), f"so {n + n + n % 3}"],
        "labels": [n % 4 > 0, n % 3 == 0],
    }
    for n in range(10)
]


@pytest.fixture(autouse=True)
def log_lines() -> Iterator[list[str]]:
    """Lines that the package logs during a test; they are printed too, as a command does."""
    from tiny import logged_lines

    from pipa_openrlhf.cli.entry import show_log

    show_log(rank=0)
    with logged_lines() as lines:
        yield lines


@pytest.fixture(autouse=True)
def no_group_is_left_behind() -> Iterator[None]:
    """A process that a later test starts would take the group of one of an earlier test's training for its own."""
    yield
    from tiny import GROUP

    for name in GROUP:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    """Mark every test that trains or starts a process, so that ``-m "not trains"`` is the quick ones.

    Where several processes share the files of tests, the longest come first, so that none is left to one of them at
    the end.
    """
    import marks

    for item in items:
        if marks.trains(item):
            item.add_marker("trains")
    if hasattr(config, "workerinput"):
        seconds = marks.seconds_of_files(items)
        items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of two different tiny models with one tokenizer: ``policy`` and ``prior``."""
    from tiny import make_model, make_tokenizer

    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("prior", 1)):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def run_script():
    """``run_script("quickstart.sh", "--fast")``: a script of ours, with every core."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def run(script, *words, timeout=1800) -> subprocess.CompletedProcess:
        command = ["bash", str(SCRIPTS / script), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)

    return run


@pytest.fixture(scope="session")
def fast_quickstart(run_script, tmp_path_factory):
    """Folder and output of the quickstart's short form, run once for all tests that look at it."""
    work = tmp_path_factory.mktemp("quickstart") / "work"
    done = run_script("quickstart.sh", "--fast", "--work", work)
    assert done.returncode == 0, done.stderr[-2000:]
    return work, done.stdout


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """``two_ranks("train_pipa", *flags)``: a run on two ranks, which are started once for all such runs."""
    from several_runs import TwoRanks

    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks.run
    ranks.close()


@pytest.fixture
def small_run(tiny_models, tmp_path):
    """``small_run(output, **{"flag": value})`` -> the flags of a run: six steps, checkpoints after each."""
    from tiny import flags, write_jsonl

    data = write_jsonl(tmp_path / "data.jsonl", ROWS)

    def make(output, **changes) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "prior.model_name_or_path": tiny_models / "prior",
                "prior.cache_dir": tmp_path / "cache",
                "data.dataset": data,
                "data.annotation": "step",
                "pipa.variant": "n",
                "ds.param_dtype": "fp32",
                "ds.zero_stage": 0,
                "train.batch_size": 4,
                "train.micro_batch_size": 2,
                "train.max_epochs": 2,
                "adam.lr": 0.01,
                "ckpt.save_steps": 1,
                "ckpt.max_num": 99,
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make
