"""From the YAML file of a sweep to its trials: every point of the grid as configs of a training and an evaluation."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipa_openrlhf.cli.flags import OBJECTIVE, config_of, flat, new_config, read_yaml, shown_settings
from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.ray_sweep import Trial
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.config import EvaluateConfig
from pipa_openrlhf.objectives.table import FAMILIES
from pipa_openrlhf.settings import MAY_CHANGE, flatten, settings_of, updated, with_absolute_paths

_FLAG = "--sweep.file"
_PARTS = ("train", "grid", "evaluate")
# A trial's folders are the sweep's, and so is what happens when it is started again.
_OF_SWEEP = {
    "train": ("ckpt.output_dir", "ckpt.path", "ckpt.load_enable", "ckpt.overwrite", "local_rank"),
    "evaluate": ("model.model_name_or_path", "evaluate.output_dir", "evaluate.overwrite", "local_rank"),
}
# Trials are evaluated with the same seed, and read one cache.
_OF_TRIALS_OWN = ("train.seed", "local_rank", "model.model_name_or_path")
_SHARED = ("prior.cache_dir", "data.cache_dir")

Point = dict[str, Any]  # dotted name of a flag to its value


def read_grid(path: str) -> list[Trial]:
    """The trials of a file, with every flag of theirs checked; the last axis of the grid changes fastest.

    Raises:
        UserError: what is wrong with the file, or with a trial of it, which is named.
    """
    parts = _parts(path)
    shared = _settings(parts["train"], f"{_FLAG} {path}: train", _OF_SWEEP["train"])
    evaluation = _settings(parts["evaluate"], f"{_FLAG} {path}: evaluate", _OF_SWEEP["evaluate"])
    axes = [_axis(name, values, f"{_FLAG} {path}: grid: {name}") for name, values in parts["grid"].items()]
    _check_axes(axes, shared, f"{_FLAG} {path}: grid")
    trials: list[Trial] = []
    for point in itertools.product(*(axis.items() for axis in axes)):
        names = dict(zip(parts["grid"], (shown for shown, _ in point)))
        settings = {name: value for _, values in point for name, value in values.items()}
        trial = _trial(names, {**_of_objective(settings, shared), **settings}, evaluation, f"{_FLAG} {path}")
        same = next((one for one in trials if _decisive(one.config) == _decisive(trial.config)), None)
        if same is not None:
            raise UserError(f"{_FLAG} {path}: two trials are the same: {same.name} and {trial.name}; remove one value")
        trials.append(trial)
    return trials


def _parts(path: str) -> dict[str, dict]:
    content = read_yaml(path, _FLAG)
    unknown = [name for name in content if name not in _PARTS]
    if unknown:
        raise UserError(f"{_FLAG} {path}: {unknown[0]} is no part of a sweep; there are {', '.join(_PARTS)}")
    for name in _PARTS:
        if not isinstance(content.get(name), dict) or not content[name]:
            raise UserError(f"{_FLAG} {path}: {name} is missing or empty; write `{name}:` and settings below it")
    return content


def _settings(nested: dict, where: str, of_sweep: tuple[str, ...]) -> Point:
    _check_names(nested, where)
    settings = dict(flat(nested))
    for name in settings:
        if name in of_sweep:
            raise UserError(f"{where}: {name} is set by the sweep; leave it out")
    return settings


def _axis(name: Any, values: Any, where: str) -> dict[str, Point]:
    """What a trial sets at each of an axis's values, by how the table shows it: values of one flag, or names with the
    flags of each."""
    if not isinstance(values, list | dict) or not values:
        raise UserError(f"{where}: write a list of values, such as [1.0e-5, 1.0e-4], or names with flags below each")
    axis: dict[str, Point] = {}
    for value in values:
        nested = values[value] if isinstance(values, dict) else {name: value}
        if not isinstance(nested, dict) or not nested or None in nested.values():
            raise UserError(f"{where}: {_text(value)} is empty; give a value, or below a name the flags that it sets")
        if _text(value) in axis:
            raise UserError(f"{where}: {_text(value)} stands there twice")
        axis[_text(value)] = _settings(nested, where, _OF_SWEEP["train"])
    return axis


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_names(nested: Any, where: str) -> None:
    """YAML takes `on`, `2` and such for names that are no text."""
    if isinstance(nested, dict):
        for name, value in nested.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: {name} is no setting of this command; put quotes around a name")
            _check_names(value, where)


def _check_axes(axes: list[dict[str, Point]], shared: Point, where: str) -> None:
    """Each flag is set in one place."""
    set_before = dict.fromkeys(shared, "train")
    for axis in axes:
        names = {name: "another axis" for point in axis.values() for name in point}
        for name in names:
            if name in _SHARED:
                raise UserError(f"{where}: {name} is one for all trials; set it under train")
            if name in set_before:
                raise UserError(f"{where}: {name} is set by {set_before[name]} too; set it in one place")
        set_before.update(names)


def _trial(names: dict[str, str], settings: Point, evaluation: Point, where: str) -> Trial:
    name = "; ".join(f"{axis} {value}" for axis, value in names.items())
    try:
        config = _train_config(settings, where)
        trial = Trial(names, config, _evaluate_config(config, evaluation, where))
        trial.check()
    except UserError as error:
        raise UserError(f"{error} (trial {name})") from error
    return replace(trial, config=with_absolute_paths(config), evaluation=with_absolute_paths(trial.evaluation))


def _of_objective(settings: Point, shared: Point) -> Point:
    """The shared settings without those that only other objectives of the grid have."""
    family = settings.get(OBJECTIVE, shared.get(OBJECTIVE))
    if family not in FAMILIES:
        return shared
    own = _names(str(family))
    others = {name for one in FAMILIES for name in _names(one)} - own
    return {name: value for name, value in shared.items() if name not in others}


def _names(family: str) -> set[str]:
    shown = list(shown_settings(new_config("train", family)))
    return {one.name for one in shown} | {one.spec.former for one in shown if one.spec.former}


def _decisive(config: RunConfig) -> dict[str, Any]:
    """What two runs must differ in."""
    values = {one.name: one.value(config) for one in settings_of(config) if one.spec.role != MAY_CHANGE}
    return {**values, "objective": config.objective.flag_group, "train.max_epochs": config.train.max_epochs}


def _train_config(settings: Point, where: str) -> RunConfig:
    return updated(config_of("train", settings, where), {"ckpt.load_enable": True})


def _evaluate_config(config: RunConfig, given: Point, where: str) -> EvaluateConfig:
    """How a trial's model is evaluated: templates and data type are those of its training unless given."""
    return config_of("evaluate", {**dict(_inherited(config)), **given}, where)


def _inherited(config: RunConfig) -> Iterator[tuple[str, Any]]:
    values, default = flatten(config), flatten(new_config("train"))
    for one in shown_settings(new_config("evaluate")):
        if one.name in values and one.name not in _OF_TRIALS_OWN and values[one.name] != default.get(one.name):
            yield one.name, values[one.name]
