"""The seam to OpenRLHF says at import which version it was tested with, if another one is installed."""

import importlib.metadata
import importlib.util

import pytest

from pipa_openrlhf.distributed import upstream


@pytest.fixture
def import_with(monkeypatch, caplog):
    """``import_with("0.12.0")``: what the seam logs where that version is installed; None: installed without one."""

    def load(version: str | None) -> list[str]:
        def faked(name):
            assert name == "openrlhf"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", faked)
            spec = importlib.util.spec_from_file_location("seam_of_this_test", upstream.__file__)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return [record.getMessage() for record in caplog.records if record.name == "seam_of_this_test"]

    return load


@pytest.mark.parametrize("version", ["0.11.2", "0.11.2+local"])
def test_the_tested_version_is_silent(import_with, version):
    assert import_with(version) == []


@pytest.mark.parametrize("version", ["0.12.0", "0.11.20", "0.11.1"])
def test_another_version_is_named_in_one_line(import_with, version):
    [line] = import_with(version)
    assert line.startswith(f"OpenRLHF {version} is installed; pipa_openrlhf was tested with 0.11.2")
    assert "\n" not in line


def test_a_copy_without_metadata_is_named_too(import_with):
    [line] = import_with(None)
    assert line.startswith("OpenRLHF without a version is installed")


def test_only_the_first_rank_says_it(import_with, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert import_with("0.12.0") == []


def test_the_version_tested_is_the_one_that_is_installed():
    assert importlib.metadata.version("openrlhf") == upstream.REQUIRED_VERSION
