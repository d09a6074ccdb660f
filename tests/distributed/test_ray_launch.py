"""Training on a Ray cluster: a worker that dies, and the line that a user reads when something is wrong."""

import time
from pathlib import Path

import psutil
import pytest
import ray.train
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors.torch import load_file
from tiny import read_jsonl, run_in_process, start_module, train
from torch.testing import assert_close

from pipa_openrlhf.cli import launch_ray
from pipa_openrlhf.cli.flags import parse
from pipa_openrlhf.distributed.ray_launch import LaunchConfig, RaySettings
from pipa_openrlhf.distributed.ray_watch import Watch, first_cause
from pipa_openrlhf.errors import UserError

DIED = WorkerHealthCheckFailedError("of rank 1", ActorDiedError())
LOST_THE_OTHER = RuntimeError("[/gloo/pair.cc:533] Connection closed by peer [127.0.0.1]:2345")


def kill_a_worker(driver, metrics: Path, after: int) -> None:
    """From outside, with kill -9, once so many steps are written."""
    while driver.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= after):
        time.sleep(0.05)
    workers = [one for one in psutil.Process(driver.pid).children(recursive=True) if "RayTrainWorker" in one.name()]
    assert len(workers) == 2
    workers[0].kill()


def test_a_killed_worker_is_started_again_and_nothing_of_the_run_is_lost(small_run, tmp_path):
    changes = {"ds.zero_stage": 2, "ds.lora.rank": 2, "train.max_epochs": 40, "adam.lr": 1e-3, "ckpt.max_num": 2}
    launcher = ["--ray.num_workers", 2, "--ray.max_failures", 1, "--ray.address", "local", "--"]
    run = small_run("killed", **changes, **{"ckpt.load_enable": True})
    driver = start_module("launch_ray", *launcher, "pipa_openrlhf.cli.train_pipa", *run)
    kill_a_worker(driver, tmp_path / "killed" / "metrics.jsonl", after=5)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors[-3000:]
    assert "died: it was killed, ran out of memory, or its node was lost; restart 1 of 1" in output
    assert "Resumed from" in output and "Step 120 of 120: loss " in output

    rows = train("train_pipa", *small_run("alone", **changes))
    killed = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in killed] == [row["step"] for row in rows]
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "alone")]
    assert_close(*adapters, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "nothing to launch: write launch_ray"),
        (["trainpipa"], "trainpipa cannot be launched: it is not one of train, train_pipa"),
        (["pipa_openrlhf.cli.report"], "pipa_openrlhf.cli.report cannot be launched"),
        (["train_pipa", "--pipa.variant", "x"], "argument --pipa.variant: invalid choice: 'x'"),
        (["train_pipa"], "--model.model_name_or_path is missing"),
        (
            ["annotate", *"--annotate.method rule --annotate.input i.jsonl --annotate.output o.jsonl".split()],
            "--annotate.method rule is the work of one process",
        ),
    ],
)
def test_a_wrong_command_is_named_before_anything_is_started(words, line, capsys):
    assert run_in_process("launch_ray", command=words) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--ray.num_workers", "0"], "--ray.num_workers must be at least 1, got 0"),
        (["--ray.num_workers", "2", "--ray.min_workers", "3"], "--ray.min_workers 3 is more than --ray.num_workers 2"),
        (["--ray.resources_per_worker", "{GPU: 1}"], "--ray.resources_per_worker {GPU: 1}: not JSON"),
        (["--ray.resources_per_worker", '{"CPU": 0}'], '--ray.resources_per_worker {"CPU": 0}: expected names'),
        (["--ray.resources_per_worker", "[1]"], "--ray.resources_per_worker [1]: expected names with amounts"),
        (["--ray.resources_per_worker", '{"GPU": "1"}'], '--ray.resources_per_worker {"GPU": "1"}: expected names'),
    ],
)
def test_a_wrong_flag_is_named(flags, line):
    with pytest.raises(UserError) as error:
        parse("launch_ray", flags).check()
    assert str(error.value).startswith(line)


def test_a_machine_without_ray_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^launch_ray needs Ray: run scripts/install.sh"):
        LaunchConfig().check()


@pytest.mark.parametrize("settings", [RaySettings(max_failures=1), RaySettings(num_workers=2, min_workers=1)])
def test_a_run_that_may_be_restarted_must_have_what_a_restart_needs(settings, small_run):
    with pytest.raises(UserError, match="give --ckpt.load_enable and --ckpt.save_steps"):
        launch_ray.main(LaunchConfig(settings), ["train_pipa", *small_run("out")])


def test_a_job_does_not_write_into_the_copy_that_ray_deletes(small_run, tmp_path, monkeypatch):
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=f"^--ckpt.output_dir {copy}/out is in a copy that Ray deletes after the job"):
        launch_ray.main(LaunchConfig(), ["train_pipa", *small_run("x", **{"ckpt.output_dir": "out"})])


@pytest.mark.parametrize(
    "failures, line",
    [
        ({0: LOST_THE_OTHER, 1: ValueError("no such thing\nmore")}, "ValueError: no such thing (rank 1)"),
        ({0: LOST_THE_OTHER, 1: DIED}, "the worker of rank 1 died: it was killed, ran out of memory, or its node"),
        ({1: DIED, 2: OSError(28, "No space left on device", "/out")}, "OSError: [Errno 28] No space left on device"),
    ],
)
def test_the_first_cause_is_not_what_followed_from_it(failures, line):
    assert first_cause(ray.train.WorkerGroupError("", failures)).startswith(line)


def test_a_users_mistake_ends_the_run_and_a_death_does_not(capsys):
    watch = Watch(max_failures=2)
    for _ in range(3):
        watch.after_exception(None, {0: LOST_THE_OTHER, 1: DIED})
    restarts = [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()]
    assert restarts == ["restart 1 of 2", "restart 2 of 2"]
    with pytest.raises(UserError, match=r"^bad data \(rank 1\)$") as mistake:
        watch.after_exception(None, {0: LOST_THE_OTHER, 1: UserError("bad data")})
    assert first_cause(ray.train.ControllerError(mistake.value)) == "bad data (rank 1)"
