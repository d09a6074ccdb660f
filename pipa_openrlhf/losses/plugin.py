"""An objective from a user's own file."""

import importlib.util
import os
import sys

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.losses.objectives import Objective, ObjectiveSettings


def load_objective(path: str, settings: ObjectiveSettings) -> Objective:
    """What ``make_objective(settings)`` in the Python file at ``path`` returns.

    Raises:
        UserError: there is no such file or function, or it returns something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"--pipa.objective_module {path}: no such file")
    spec = importlib.util.spec_from_file_location("pipa_user_objective", path)
    if spec is None:
        raise UserError(f"--pipa.objective_module {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--pipa.objective_module {path} line {error.lineno}: {error.msg}") from error
    if not callable(getattr(module, "make_objective", None)):
        raise UserError(f"--pipa.objective_module {path}: it must define make_objective(settings)")
    objective = module.make_objective(settings)
    if not isinstance(objective, Objective):
        raise UserError(f"--pipa.objective_module {path}: make_objective must return an Objective, got {objective!r}")
    if (objective.token_loss is None) == (objective.answer_loss is None):
        raise UserError(f"--pipa.objective_module {path}: set exactly one of token_loss and answer_loss")
    return objective
