"""Write constraints.txt from the installed packages: ``make lock``, or ``python scripts/lock.py`` in .venv.

What is pinned is everything that our requirements and those of OpenRLHF at run time lead to. Where a package takes
fewer Pythons than we do, its pin holds for those alone; an older Python gets what pip finds there. Needs Python 3.11.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
EXTRAS = ("dev", "docs", "quickstart", "ray", "judge")
# pip's own tools, and ourselves.
LEFT_OUT = {"pip", "setuptools", "wheel", "pipa-openrlhf"}
HEADER = """\
# The versions that the tests ran with: Python {python}, {system}, CPU. Written by `make lock`; change nothing here.
# scripts/install.sh applies it on CPU. On CUDA the pins of openrlhf and the builds of torch decide.
"""


def roots() -> list[Requirement]:
    """What scripts/install.sh asks pip for: ours with its extras, and what OpenRLHF needs when it runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *(ROOT / "scripts" / "openrlhf_runtime.txt").read_text().splitlines()]
    for extra in EXTRAS:
        words += project["optional-dependencies"][extra]
    return [Requirement(word) for word in words if not word.startswith("#")]


def closure(requirements: list[Requirement]) -> tuple[dict[str, str], set[str]]:
    """Pins by package name, and the names that are not installed."""
    pins: dict[str, str] = {}
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    left = [(one, extra) for one in requirements for extra in ("", *one.extras)]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        pins[name] = pin(name, found)
        for word in found.requires or []:
            needed = Requirement(word)
            if needed.marker is None or needed.marker.evaluate({**default_environment(), "extra": extra}):
                left += [(needed, more) for more in ("", *needed.extras)]
    return pins, missing


def pin(name: str, found) -> str:
    """``name==version``, without a build's own suffix, and with the oldest Python where that is newer than ours."""
    oldest = re.search(r">=\s*(3\.\d+)", found.metadata["Requires-Python"] or "")
    marker = f'; python_version >= "{oldest[1]}"' if oldest and Version(oldest[1]) > Version("3.10") else ""
    return f"{name}=={Version(found.version).public}{marker}"


def main() -> None:
    pins, missing = closure(roots())
    pins["openrlhf"] = pin("openrlhf", distribution("openrlhf"))  # installed without its own requirements
    header = HEADER.format(python=platform.python_version(), system=f"{platform.system()} {platform.machine()}")
    LOCK.write_text(header + "".join(f"{pins[name]}\n" for name in sorted(pins)))
    print(f"{len(pins)} packages in {LOCK.name}; not installed, so not pinned: {', '.join(sorted(missing)) or 'none'}")


if __name__ == "__main__":
    main()
