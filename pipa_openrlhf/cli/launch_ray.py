"""Training, `sample`, `evaluate` or `annotate` on a Ray cluster: ``launch_ray --ray.num_workers 8 -- MODULE FLAGS``

``MODULE FLAGS`` is what follows ``deepspeed --module`` elsewhere: ``pipa_openrlhf.cli.train_pipa --data.dataset ...``
"""

import importlib
import os
import sys
from functools import partial
from typing import Any

from pipa_openrlhf.cli.entry import run, show_log
from pipa_openrlhf.cli.flags import TRAINING_MODULES, parse
from pipa_openrlhf.distributed.ray_launch import LaunchConfig
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import settings_of, with_absolute_paths

_MODULES = (*TRAINING_MODULES, "sample", "evaluate", "annotate")
_USAGE = "write launch_ray --ray.num_workers 8 -- pipa_openrlhf.cli.train_pipa --data.dataset ..."

# In the path of the folder in which a job of `ray job submit --working-dir` runs.
_COPIES = os.path.join(os.sep, "runtime_resources", "working_dir_files", "")


def main(config: LaunchConfig, command: list[str]) -> None:
    """Check the command here, before anything is started, and run it on the workers.

    Args:
        command: the module and its flags.
    """
    from pipa_openrlhf.distributed.ray_launch import launch

    if not command:
        raise UserError(f"nothing to launch: {_USAGE}")
    module = command[0].removeprefix("pipa_openrlhf.cli.")
    if module not in _MODULES:
        raise UserError(f"{command[0]} cannot be launched: it is not one of {', '.join(_MODULES)}; {_USAGE}")
    run_config = parse(module, command[1:])
    run_config.check()
    config.check()
    if config.restarts and module in TRAINING_MODULES and not run_config.ckpt.load_enable:
        raise UserError(
            "a run that is restarted goes on from its checkpoints: give --ckpt.load_enable and --ckpt.save_steps "
            "after the module, or leave out --ray.max_failures and --ray.min_workers"
        )
    if config.restarts and module == "evaluate" and run_config.evaluate.overwrite:
        raise UserError(
            "--evaluate.overwrite would delete the answers of before a restart too: delete the folder yourself, or "
            "leave out --ray.max_failures and --ray.min_workers"
        )
    if module == "annotate" and run_config.annotate.method != "rollout":
        raise UserError(
            f"--annotate.method {run_config.annotate.method} is the work of one process, and no model of its own: "
            "start it without launch_ray"
        )
    run_config = with_absolute_paths(run_config)
    _check_outputs(run_config)
    launch(config, _work, {"module": module, "config": run_config})


def _check_outputs(config: Any) -> None:
    """Refuse to write into the copy of ``--working-dir`` in which Ray runs a job: it goes with the job."""
    here = os.path.realpath(os.getcwd())
    for one in settings_of(config):
        path = one.value(config)
        if _COPIES in here and one.spec.is_written and path and os.path.realpath(path).startswith(here):
            raise UserError(f"--{one.name} {path} is in a copy that Ray deletes after the job: give an absolute path")


def _work(arguments: dict) -> None:
    """What a worker does, in a thread of Ray's, where no signal can be caught."""
    import ray.train
    from tqdm import tqdm

    from pipa_openrlhf.training.ray_report import ReportToRay
    from pipa_openrlhf.training.run import train

    show_log(ray.train.get_context().get_world_rank())
    # A bar rewrites its line, which a log of lines cannot: the reports stand for it.
    tqdm.display = lambda *_, **__: None
    if arguments["module"] in TRAINING_MODULES:
        train(arguments["config"], [ReportToRay()])
    else:
        importlib.import_module(f"pipa_openrlhf.cli.{arguments['module']}").main(arguments["config"])


def cli() -> int:
    """Console entry point."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return run(partial(main, command=words[end + 1 :]), "launch_ray", words[:end])


if __name__ == "__main__":
    sys.exit(cli())
