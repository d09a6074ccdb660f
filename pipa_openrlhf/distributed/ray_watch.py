"""What Ray's controller tells of the workers: their progress, who died, and what went wrong first."""

from ray.exceptions import RayError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from pipa_openrlhf.errors import UserError, first_line


class Watch(UserCallback):
    """Prints in the controller, whose lines Ray hands on to the driver.

    A :class:`UserError` ends the run: a restart would only meet it again.

    Args:
        max_failures: as in the settings of Ray.
    """

    def __init__(self, max_failures: int):
        self._max_failures = max_failures
        self._failures = 0

    def after_report(self, run_context, metrics: list[dict], checkpoint) -> None:
        """A row of rank 0's metrics, as ``metrics.jsonl`` has them, and ``total_steps``."""
        row = metrics[0]
        names = [name for name in ("loss", "lr", "tokens_per_second") if row[name] is not None]
        shown = [f"{name} {row[name]:.4g}" for name in names]
        print(f"Step {row['step']} of {row['total_steps']}: {', '.join(shown)}", flush=True)

    def after_exception(self, run_context, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the user's mistake, where there is one; says what is done about anything else."""
        for rank, error in worker_exceptions.items():
            if isinstance(error, UserError):
                raise UserError(f"{error} (rank {rank})")
        self._failures += 1
        if self._max_failures in (-1, *range(self._failures, self._max_failures + 1)):
            most = "" if self._max_failures == -1 else f" of {self._max_failures}"
            print(f"{_worst(worker_exceptions)}; restart {self._failures}{most}", flush=True)


def first_cause(error: TrainingFailedError) -> str:
    """One line: what ended the run, not what followed from it."""
    if isinstance(error, WorkerGroupError):
        return _worst(error.worker_failures)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {first_line(cause)}"


def _worst(failures: dict[int, Exception]) -> str:
    """Of ranks that failed together: an error of the code, else a death, else who lost the connection to another."""
    rank, error = min(failures.items(), key=lambda failure: (_order(failure[1]), failure[0]))
    if _order(error) == 1:
        return f"the worker of rank {rank} died: it was killed, ran out of memory, or its node was lost"
    return f"{type(error).__name__}: {first_line(error)} (rank {rank})"


def _order(error: Exception) -> int:
    if isinstance(getattr(error, "health_check_failure", None), RayError):
        return 1
    return 2 if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error) else 0
