"""docs/flags.md is what its generator makes of args.py."""

import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_flags_page_is_up_to_date(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    spec = importlib.util.spec_from_file_location("make_flags_page", ROOT / "scripts" / "make_flags_page.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (ROOT / "docs" / "flags.md").read_text() == generator.flags_page(), "run python scripts/make_flags_page.py"
    assert os.path.expanduser("~") not in generator.flags_page()
