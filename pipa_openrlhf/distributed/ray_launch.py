"""A function on many workers of a Ray cluster, by Ray Train: all at once, started again where one of them dies.

Three processes have a part: the driver, which is here; Ray's controller, where ``ray_watch.py`` looks on; and the
workers, which have the environment of a launcher's ranks and Ray's process group, which DeepSpeed takes over.
"""

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipa_openrlhf.errors import UserError, first_line
from pipa_openrlhf.settings import check_bounds, setting

# A cluster of our own stores nothing but small messages; Ray would reserve a third of the memory.
_OBJECT_STORE_BYTES = 128 * 1024**2
# Seconds for the last lines of workers to arrive.
_LAST_LINES = 1.0


@dataclass(frozen=True)
class RaySettings:
    """Where workers run, how many, and what happens when one dies."""

    num_workers: int = setting(1, "workers, the ranks of the run; they start together or not at all", least=1)
    min_workers: int | None = setting(
        None,
        "go on with as few as these where nodes are lost, with more when they are back; unset: never",
        least=1,
    )
    resources_per_worker: str | None = setting(
        None, """JSON, such as '{"GPU": 1, "CPU": 8}'; unset: a GPU where the cluster has one, else a CPU"""
    )
    max_failures: int = setting(0, "restarts after the death of a worker; -1: any number", least=-1)
    address: str | None = setting(
        None,
        "of a cluster, or local: one of its own; unset: RAY_ADDRESS, one on this machine, or one of its own",
    )
    wait_seconds: float = setting(60, "longest wait for the resources of all workers, or of one trial", least=0)


@dataclass(frozen=True)
class LaunchConfig:
    """Of ``cli/launch_ray.py``."""

    ray: RaySettings = field(default_factory=RaySettings)

    @property
    def restarts(self) -> bool:
        """Whether the function may be called again after it was cut off."""
        return self.ray.max_failures != 0 or self.ray.min_workers not in (None, self.ray.num_workers)

    def check(self) -> None:
        """Raises UserError."""
        check_bounds(self)
        if (self.ray.min_workers or 1) > self.ray.num_workers:
            raise UserError(
                f"--ray.min_workers {self.ray.min_workers} is more than --ray.num_workers {self.ray.num_workers}"
            )
        parse_resources(self.ray.resources_per_worker, "--ray.resources_per_worker")
        check_installed("launch_ray")


def check_installed(command: str) -> None:
    """Raises UserError where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{command} needs Ray: run scripts/install.sh, or install this package with its extra `ray`")


def parse_resources(text: str | None, flag: str) -> dict[str, float] | None:
    """``{"GPU": 1}`` as Ray takes it.

    Raises:
        UserError: it is not JSON, or no object of amounts.
    """
    if text is None:
        return None
    flag = f"{flag} {text}"
    try:
        resources = json.loads(text)
    except ValueError as error:
        raise UserError(f"""{flag}: not JSON ({error}); write '{{"GPU": 1}}', quotes included""") from error
    if not (isinstance(resources, dict) and all(map(_is_amount, resources.values())) and any(resources.values())):
        raise UserError(f"""{flag}: expected names with amounts, such as '{{"GPU": 1, "CPU": 8}}'""")
    return resources


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def launch(config: LaunchConfig, work: Callable[[dict], None], arguments: dict) -> None:
    """Call ``work(arguments)`` on every worker, and return when all of them have.

    Args:
        work: of a module that workers can import.

    Raises:
        UserError: the workers find no place, or the first thing that went wrong in one of them.
    """
    # Read when Ray is imported: lines that differ in numbers alone are repetitions to it.
    os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", "Step ")
    import ray
    from ray.train import TrainingFailedError

    from pipa_openrlhf.distributed.ray_watch import first_cause

    is_own = connect(config.ray.address)
    try:
        asked = parse_resources(config.ray.resources_per_worker, "--ray.resources_per_worker")
        resources = asked or default_resources(ray.cluster_resources())
        wanted = config.ray.min_workers or config.ray.num_workers
        ways_out = "lower --ray.num_workers or --ray.resources_per_worker"
        wait_for_place([resources] * wanted, config.ray.wait_seconds, is_own, ways_out)
        with tempfile.TemporaryDirectory(prefix="pipa_openrlhf_ray_") as folder:
            trainer = _trainer(config.ray, resources, folder, work, arguments)
            # Its handler of ctrl-C would end this process with status 0; when the driver goes, so do the workers.
            trainer._register_sigint_handler = lambda controller: None
            if is_own:
                _leave_out_cleaner(trainer)
            trainer.fit()
    except TrainingFailedError as error:
        raise UserError(first_cause(error)) from error
    finally:
        time.sleep(_LAST_LINES)
        ray.shutdown()


def connect(address: str | None) -> bool:
    """Join a cluster, or start one on this machine; whether it was started."""
    import ray

    wanted = address or os.environ.get("RAY_ADDRESS")
    if wanted != "local":
        try:
            ray.init(wanted or "auto", logging_level="WARNING")
            return False
        except ConnectionError as error:
            if wanted:
                raise UserError(
                    f"no Ray cluster at {wanted} ({first_line(error)}): start one with ray start --head, or give "
                    "--ray.address local"
                ) from error
    # Its dashboard is ten processes, which take longer to start than all the rest.
    try:
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, logging_level="WARNING")
    except Exception as error:  # Ray has no kind of its own for a node that does not come up within its 30 seconds
        raise UserError(f"no Ray cluster could be started on this machine: {first_line(error)}") from error
    return True


def default_resources(cluster: dict[str, float], ranks: int = 1) -> dict[str, float]:
    """A GPU for each rank where the cluster has one, else a CPU."""
    return {"GPU": ranks} if cluster.get("GPU") else {"CPU": ranks}


def wait_for_place(parts: list[dict[str, float]], seconds: float, is_own: bool, ways_out: str) -> None:
    """Return when ``parts`` fit the cluster together; asks an autoscaler for what they lack.

    Args:
        ways_out: flags that would help, for the message.

    Raises:
        UserError: they do not, within ``seconds``; at once where nothing can come.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    seconds = min(seconds, 5) if is_own else seconds
    wanted = f"{len(parts)} x {json.dumps(parts[0])}"
    place = placement_group(parts, strategy="PACK")
    try:
        if place.wait(1):
            return
        names = {"CPU", "GPU", *parts[0]}
        has = json.dumps({name: amount for name, amount in ray.cluster_resources().items() if name in names})
        print(f"Waiting {seconds:g} s for {wanted}; the cluster has {has}", flush=True)
        if not place.wait(seconds):
            raise UserError(
                f"{wanted} found no place within {seconds:g} s: the cluster has {has}, some of it perhaps in use; "
                f"{ways_out}, or raise --ray.wait_seconds"
            )
    finally:
        remove_placement_group(place)


def _trainer(
    settings: RaySettings, resources: dict[str, float], folder: str, work: Callable[[dict], None], arguments: dict
):
    """Ray's trainer. ``folder`` gets what Ray writes at the driver; the run's own checkpoints are none of Ray's."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipa_openrlhf.distributed.ray_watch import Watch

    os.environ.update(
        # Where workers start again. Each miss counts as a failure, so that the wait has an end.
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(max(settings.wait_seconds, 60.0)),
        # What workers print is left as it is, without lines of Ray's on each report.
        RAY_TRAIN_ENABLE_PRINT_PATCH="0",
        RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING="0",
    )
    workers = settings.num_workers
    return TorchTrainer(
        work,
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=3600),  # as Strategy.setup_distributed has it
        scaling_config=ScalingConfig(
            num_workers=(settings.min_workers, workers) if settings.min_workers else workers,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            storage_path=folder,
            callbacks=[Watch(settings.max_failures)],
            failure_config=FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=settings.max_failures
            ),
        ),
    )


def _leave_out_cleaner(trainer) -> None:
    """Without what gives the workers' place back should the controller be killed: the cluster ends with us, and it
    asks a dashboard, and warns every second where there is none."""
    callbacks = [one for one in trainer._create_default_callbacks() if "PlacementGroup" not in type(one).__name__]
    trainer._create_default_callbacks = lambda: callbacks
