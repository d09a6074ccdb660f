"""The table of objectives: the paper's unification, by family and one by one.

Every preference objective here estimates p(c | x, y) or compares two answers, under a prior constraint. The rows
differ in what the prior is put on, in what is assumed of p(c | x), and in the loss on the data. The trainer reads what
an objective needs and never asks for its name.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.objectives.dpo import DpoConfig, dpo, ipo, step_dpo
from pipa_openrlhf.objectives.kto import KtoConfig, kto, step_kto
from pipa_openrlhf.objectives.objective import Objective, ObjectiveConfig
from pipa_openrlhf.objectives.pipa import PipaConfig, pipa_m, pipa_n
from pipa_openrlhf.objectives.sft import SftConfig, sft

if TYPE_CHECKING:
    from pipa_openrlhf.config import RunConfig

# By the name that `--objective` takes, which is also the prefix of a family's flags.
FAMILIES: dict[str, type[ObjectiveConfig]] = {
    family.flag_group: family for family in (PipaConfig, DpoConfig, KtoConfig, SftConfig)
}


def objectives() -> dict[str, Objective]:
    """Every objective of the paper, with its default settings."""
    return {
        "pipa_m": pipa_m(),
        "pipa_n": pipa_n(),
        "dpo": dpo(),
        "step_dpo_l1": step_dpo("l1"),
        "step_dpo_l0": step_dpo("l0"),
        "ipo": ipo(),
        "kto": kto(),
        "step_kto_l1": step_kto("l1"),
        "step_kto_per_step": step_kto("per_step"),
        "sft": sft(),
    }


def load_objective(path: str, config: "RunConfig") -> Objective:
    """What ``make_objective(config)`` in the Python file at ``path`` returns.

    Raises:
        UserError: there is no such file or function, or it returns something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"--pipa.objective_module {path}: no such file")
    spec = importlib.util.spec_from_file_location("pipa_user_objective", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--pipa.objective_module {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--pipa.objective_module {path} line {error.lineno}: {error.msg}") from error
    if not callable(getattr(module, "make_objective", None)):
        raise UserError(f"--pipa.objective_module {path}: it must define make_objective(config)")
    objective = module.make_objective(config)
    if not isinstance(objective, Objective):
        raise UserError(f"--pipa.objective_module {path}: make_objective must return an Objective, got {objective!r}")
    if (objective.token_loss is None) == (objective.answer_loss is None):
        raise UserError(f"--pipa.objective_module {path}: set exactly one of token_loss and answer_loss")
    return objective
