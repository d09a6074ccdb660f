"""Settings as fields of frozen dataclasses: a field is a flag, and its help, bounds and role stand beside it.

A config is a dataclass whose fields are settings or further dataclasses. The dotted path of a field is the name of its
flag: ``config.ds.lora.rank`` is ``--ds.lora.rank``. The parser, ``--help``, the page of flags, the checks,
``args.json``, ``config.yaml`` and the identity of a run are all made from the fields.
"""

import dataclasses
import math
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pipa_openrlhf.errors import UserError

Config = TypeVar("Config")

# How a setting takes part in the identity of a run: see `training/identity.py`.
DECIDES, MAY_CHANGE, BY_CONTENT = "decides", "may change", "by content"
_NEGATIVE = "must not be negative"


@dataclass(frozen=True)
class Spec:
    """What is known of a setting beside its name, type and default.

    Attributes:
        help: one line.
        choices: the only values.
        least, above, most, below: bounds of a number; a number is always finite.
        nargs: as argparse has it, for a list.
        parse: text of the command line to value; None: the field's type.
        flag: dotted name, where it is not the field's path.
        former: dotted name that an earlier version had for it, which still works.
        negation: last part of a second flag that turns a switch off.
        is_path: names a local file or folder, or a hub name.
        is_written: a path that runs write to, so never a hub name.
        role: in the identity of a run.
    """

    help: str
    choices: tuple[str, ...] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    nargs: str | int | None = None
    parse: Callable[[str], Any] | None = None
    flag: str | None = None
    former: str | None = None
    negation: str | None = None
    is_path: bool = False
    is_written: bool = False
    role: str = DECIDES


def setting(default: Any, help: str, **more) -> Any:
    """A field with its :class:`Spec`; a callable ``default`` is called for each new config."""
    metadata = {"spec": Spec(help, **more)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def free(default: Any, help: str, **more) -> Any:
    """A :func:`setting` that a resumed run may have differently: it computes the same with it, or only looks on."""
    return setting(default, help, role=MAY_CHANGE, **more)


def by_content(default: Any, help: str, **more) -> Any:
    """A :func:`setting` that decides by what it leads to, whatever its value."""
    return setting(default, help, role=BY_CONTENT, **more)


def unescaped(text: str) -> str:
    """``parse`` of a text with line ends: Bash hands "\\n" over as a backslash and an n."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(frozen=True)
class Setting:
    """One flag: where its value is in a config, and its :class:`Spec`.

    Attributes:
        name: dotted, without dashes.
        path: attribute names from the config to the value.
        type: the field's, without None.
        default: the value in a new config.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    spec: Spec

    @property
    def is_switch(self) -> bool:
        """True for a flag without a value, off unless given."""
        return self.type is bool and (self.default is False or self.spec.negation is not None)

    @property
    def negation(self) -> str:
        """Name of the flag that turns a switch off."""
        return ".".join([*self.name.split(".")[:-1], str(self.spec.negation)])

    def words(self, value: Any) -> list[str]:
        """``value`` as words of a command line; none for a switch that is off and has no flag for it."""
        if self.is_switch:
            return [f"--{self.name}"] if value else [f"--{self.negation}"] * bool(self.spec.negation)
        if isinstance(value, list | tuple):
            # Where a flag takes one word or more, none is the default.
            return [f"--{self.name}", *map(str, value)] if value or self.spec.nargs != "+" else []
        # One word: a value may begin with a dash.
        return [f"--{self.name}={str(value).lower() if isinstance(value, bool) else value}"]

    def value(self, config: Any) -> Any:
        """Its value in ``config``."""
        for name in self.path:
            config = getattr(config, name)
        return config

    def check(self, value: Any) -> None:
        """Compare one value with the bounds.

        Raises:
            UserError: it is out of them.
        """
        spec, flag = self.spec, f"--{self.name}"
        if isinstance(value, list | tuple):
            for one in value:
                self.check(one)
            return
        if spec.choices is not None and value is not None and value not in spec.choices:
            raise UserError(f"{flag} {value} is not one of {', '.join(spec.choices)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number, got {value}")
        for holds, text in (
            (spec.least is None or value >= spec.least, f"must be at least {spec.least}" if spec.least else _NEGATIVE),
            (spec.above is None or value > spec.above, f"must be above {spec.above}"),
            (spec.most is None or value <= spec.most, f"must be at most {spec.most}"),
            (spec.below is None or value < spec.below, f"must be below {spec.below}"),
        ):
            if not holds:
                raise UserError(f"{flag} {text}, got {value}")


def settings_of(config: Any, prefix: str = "", path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting of a config, in the order of its fields."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        inner = getattr(config, field.name)
        below = (*path, field.name)
        if is_dataclass(inner):
            group = getattr(inner, "flag_group", field.name)
            yield from settings_of(inner, f"{prefix}{group}.", below)
        else:
            spec = field.metadata["spec"]
            yield Setting(
                spec.flag or f"{prefix}{field.name}", below, _without_none(hints[field.name]), _default(field), spec
            )


def flatten(config: Any) -> dict[str, Any]:
    """Dotted name to value."""
    return {one.name: one.value(config) for one in settings_of(config)}


def updated(config: Config, values: dict[str, Any]) -> Config:
    """A copy of ``config`` with other values, by dotted name."""
    places = {one.name: one.path for one in settings_of(config)}
    for name, value in values.items():
        config = _replace(config, places[name], value)
    return config


def to_yaml(config: Any) -> str:
    """Every flag's value, nested by the dots of its name; ``--config`` reads it. Local paths are absolute."""
    nested: dict[str, Any] = {}
    objective = getattr(config, "objective", None)
    if objective is not None:
        nested["objective"] = objective.flag_group
    hidden = getattr(objective, "hidden_groups", ())
    config = with_absolute_paths(config)
    for one in settings_of(config):
        if one.path[0] in hidden:
            continue
        value = one.value(config)
        *groups, leaf = one.name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def with_absolute_paths(config: Config) -> Config:
    """A copy of ``config`` that means the same in any working folder of this machine."""
    paths = {}
    for one in settings_of(config):
        value = one.value(config)
        if isinstance(value, str) and one.spec.is_written:
            paths[one.name] = os.path.abspath(os.path.expanduser(value))
        elif isinstance(value, str) and one.spec.is_path:
            paths[one.name] = _absolute(value)
    return updated(config, paths)


def _absolute(paths: str) -> str:
    """Comma-separated names; those of local files and folders, with or without ``@folder``, made absolute."""
    names = [name.strip() for name in paths.split(",")]
    if not all(os.path.exists(name.split("@")[0]) for name in names):
        return paths
    return ",".join(map(os.path.abspath, names))


def check_bounds(config: Any) -> None:
    """Compare every value with the bounds that stand beside its field.

    Raises:
        UserError: one is out of them.
    """
    for one in settings_of(config):
        one.check(one.value(config))


def _replace(config: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    inner = _replace(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _without_none(hint: Any) -> Any:
    """``int | None`` to ``int``; ``Sequence[float]`` to ``float``; ``str | Sequence[str]`` to ``str``."""
    if get_origin(hint) in (Union, types.UnionType):
        return _without_none(next(one for one in get_args(hint) if one is not type(None)))
    return get_args(hint)[0] if get_origin(hint) is not None else hint
