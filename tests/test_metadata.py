"""What is written down in more than one file says the same everywhere."""

import re
from importlib.metadata import requires
from pathlib import Path

import pipa_openrlhf
from pipa_openrlhf.distributed.upstream import REQUIRED_VERSION

ROOT = Path(__file__).resolve().parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text()


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r'^[ "a-z=\[]*?([\w-]+)==([\w.]+)', text(name), re.MULTILINE))


def test_one_version_of_the_package():
    assert f"\nversion: {pipa_openrlhf.__version__}\n" in text("CITATION.cff")
    assert f"\n## [{pipa_openrlhf.__version__}]" in text("CHANGELOG.md")


def test_one_version_of_openrlhf():
    files = ("pyproject.toml", "scripts/install.sh", "scripts/test_newest.sh", "README.md", "constraints.txt")
    found = {name: set(re.findall(r"openrlhf==([\w.]*\w)", text(name))) for name in files}
    assert found == dict.fromkeys(files, {REQUIRED_VERSION})


def test_one_version_of_vllm_which_is_openrlhfs():
    [pin] = [one for one in requires("openrlhf") if one.endswith('extra == "vllm"')]
    files = ("pyproject.toml", "pipa_openrlhf/generate/config.py", "docs/evaluation.md", "tests/generate/test_vllm.py")
    for name in files:
        assert {f"vllm=={version}" for version in re.findall(r"vllm(?:-cpu)?==([\d.]*\d)", text(name))} == {
            pin.split(";")[0]
        }


def test_pins_agree_with_what_was_tested():
    tested = pins("constraints.txt")
    for name in ("pyproject.toml", "scripts/openrlhf_runtime.txt", "scripts/install.sh"):
        for package, version in re.findall(r"\b(torch|transformers|deepspeed|trl)==([\w.]*\w)", text(name)):
            assert (name, package, version) == (name, package, tested[package])


def test_the_console_scripts_are_the_modules_with_a_command_line():
    scripts = dict(
        re.findall(r'^pipa-([\w-]+) = "pipa_openrlhf\.cli\.(\w+):cli"$', text("pyproject.toml"), re.MULTILINE)
    )
    modules = {path.stem for path in (ROOT / "pipa_openrlhf" / "cli").glob("*.py") if "\ndef cli(" in path.read_text()}
    assert modules and modules <= set(scripts.values())
    assert all(name == module.replace("_", "-") for name, module in scripts.items())
